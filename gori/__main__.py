"""`python -m gori`, so that torchrun can start it."""

from gori.cli import main

main()
