"""
A system's folder: what lies in it, how it is read and written, and which of its stages are valid.

The folder as a whole:

- `view`: `FolderView`, what a folder says: settings, ledger, table, valid stages; every read is checked.
- `system`: `SystemFolder`, a view that may be written to; each change is atomic and synced.
- `adding`: the part of it that adds rows.
- `checkpointing`: the part of it in which stages train.
- `opening`: opens a folder that may come from anywhere, to write or to be looked at only.
- `copying`: copies one while others write to it.
- `status`: what serves and how many deletions it outlives, as `hf-s3t status` says.
- `layout`: the names of everything that may lie in a folder.

One module for each kind of file, its one reader and writer:

- `config_file`: `s3t_config.json`, whose presence makes a folder a system, in the formats that it had.
- `ledger_file`: the ledger, and the pins by which other files remember its last line.
- `signatures_file`: what was signed of its lines.
- `signed_ledger`: signs what is not signed, and takes in what others signed.
- `audits_file`: what others signed who had trained stages again.
- `table_file`: the table of examples.
- `addition_file`: rows that are being added to it.
- `gate_file`: the terms of their prompts, by which a gate weighs shards.
- `erasure_requests_file`: the requests to erase that servers took, so that a repeated one is the same.
- `gate_view`: what a folder says of them.
- `table_view`: ledger and table as they are read together.
- `secret`: the secret of a system's digests, in the environment or in `ledger.key`.
- `stage_record`: `stage.json`, what a stage was made from.
- `checkpoints`: checkpoints of stages in training.
- `scratch`: where each trainer has its own of these.
- `claims`: who trains which stage, and which of them are gone.
- `shared_growth`: how trainers share what is missing: who takes which stage next.

What they stand on:

- `files`: writes that last through a crash, reads that show what was altered.
- `foreign`: what a folder from elsewhere may hold instead of files: links, pipes, names that are no text.
- `identity`: which system a config is of.
- `earlier_slices`: digests of slices as format 1 wrote them, translated where a record is read.
- `finite`: NaN and infinity, found in the bytes of an adapter.
- `known_stages`: records of stages as they were last read, so that what did not change is not read again.
- `processes`: which process of which machine something belongs to, and whether it is gone.
- `lock`: under which deletions are recorded and stages renamed into place.
- `removal`: removes so that a crash brings nothing back.
- `versions`: of the libraries whose arithmetic a stage depends on.
"""
