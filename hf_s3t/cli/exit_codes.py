"""How a command ends, for who calls it from a script."""

FINE, REFUSED, USAGE, EXHAUSTED = 0, 1, 2, 3
EXIT_CODES = (
    "Exit codes: 0 fine; 1 problems were found, or the request was refused and nothing changed; 2 wrong usage; "
    "3 exhausted: no shard is left to answer (`unlearn` did its work), or none of the one to export."
)
