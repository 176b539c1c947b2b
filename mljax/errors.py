"""The one exception whose message is meant for the person at the terminal."""


class UserError(ValueError):
    """Something the user gave is wrong. `main` prints the message as one line.

    The message names the thing (key, file, class) and says what to do.
    """
