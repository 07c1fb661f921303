"""What is done to a folder without a model: deletions, receipts, inspection, purge."""
