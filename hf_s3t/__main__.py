"""`python -m hf_s3t` is `hf-s3t`."""

from .cli.start import main


if __name__ == "__main__":
    main()
