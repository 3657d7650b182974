"""`python -m foreword` is the command line."""

from foreword.cli import main

main()
