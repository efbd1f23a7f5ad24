"""`python -m oats_vision`: the command line."""

from oats_vision.cli import main

main()
