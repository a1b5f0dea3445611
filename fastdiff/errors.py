"""Errors that people read: one line each."""


class TrainingError(RuntimeError):
    """A run that failed on its way; the message is one line and says what of it is left."""


def one_line(message: object) -> str:
    """A message without line breaks."""
    return " ".join(str(message).split())


def reason_of(error: Exception) -> str:
    """What another library's error says, short enough for our own line: its first line, 200 characters at most."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0][:200]
    return f"{line} is missing" if isinstance(error, KeyError) else line
