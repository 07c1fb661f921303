"""
The command line `hf-s3t`.

- `start`: starts it, with no more than the command needs.
- `app`: the commands together.
- `ending`: how they end.
- `exit_codes`: with which code.
- `arguments`: what commands take, and the ids and groups that these name.
- `verify`: the commands that make keys and check receipts, without a system.
- `folder`: commands on a system's folder.
- `signing`: the command that signs lines of a ledger, and the writing of signed receipts.
- `audits`: the commands for an audit by somebody else.
- `report`: the command that writes a report for the file.
- `hub`: commands on its repository.
- `plan`: the command for before there is a system.
- `serve`: the command that serves a system over HTTP.
- `measuring`: what a stage takes in time and memory, measured for it.
- `watching`: `status --watch`, who trains which stage.
- `rendering`: tables for people, JSON for programs.
"""

from .start import main


__all__ = ["main"]
