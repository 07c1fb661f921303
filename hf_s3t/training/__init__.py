"""Training a system: the trainers, what decides a stage, and the audit."""
