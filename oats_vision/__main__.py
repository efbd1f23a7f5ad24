"""`python -m oats_vision`: the command line."""

from oats_vision.interrupt import guarded


def main() -> None:
    """Run the command line; signals are heeded from before its imports, which take a while."""

    def command_line() -> None:
        from oats_vision.cli import main

        main()

    guarded(command_line)


if __name__ == "__main__":
    main()
