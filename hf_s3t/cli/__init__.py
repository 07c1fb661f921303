"""
The command line `hf-s3t`.

- `app`: the commands together, and how they end.
- `exit_codes`: with which code.
- `arguments`: what commands take, and the ids and groups that these name.
- `folder`: commands on a system's folder.
- `hub`: commands on its repository.
- `plan`: the command for before there is a system.
- `serve`: the command that serves a system over HTTP.
- `measuring`: what a stage takes in time and memory, measured for it.
- `watching`: `status --watch`, who trains which stage.
- `rendering`: tables for people, JSON for programs.
"""

from .app import main


__all__ = ["main"]
