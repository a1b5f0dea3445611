"""DenoisingView on a terminal (a small one, played here) and elsewhere."""

import io
import re

import pytest
import torch
from language_runs import byte_tokenizer

from fastdiff.visualization import DenoisingView, watch
from fastdiff.visualization import terminal as terminal_text

MASK = 3


class Terminal(io.StringIO):
    """What the escape sequences used make of a screen: rows of cells, wide characters taking two."""

    def __init__(self, width=20, height=8):
        super().__init__()
        self.width, self.height, self.lines, self.row, self.cursor, self.new = width, height, [[]], 0, True, set()

    def isatty(self):
        return True

    def write(self, text):
        highlighted = False
        for token in re.findall(r"\x1b\[\??\d*(?:;\d+)*[A-Za-z]|.", text, re.DOTALL):
            if token == "\n":
                self.row += 1
                self.lines += [[] for _ in range(self.row + 1 - len(self.lines))]
            elif not token.startswith("\x1b"):
                if token == "\r":
                    continue  # what follows it goes up or erases
                self.lines[self.row].append(token)
                cells = sum(watch.cell_width(c) for c in self.lines[self.row])
                assert cells < self.width, "the terminal would wrap this line by itself"
                if highlighted:
                    self.new.add(token)
            elif token.endswith("A"):
                self.row -= int(token[2:-1])
                assert self.row >= max(len(self.lines) - self.height, 0), "moved above the screen"
            elif token == "\x1b[J":
                self.lines = self.lines[: self.row] + [[]]
            elif token in ("\x1b[?25l", "\x1b[?25h"):
                self.cursor = token.endswith("h")
            elif token.endswith("m"):
                highlighted = token != "\x1b[0m"
            else:
                raise AssertionError(f"unknown sequence {token!r}")
        return len(text)

    def text(self):
        return "\n".join("".join(line) for line in self.lines).rstrip("\n")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(watch.shutil, "get_terminal_size", lambda: (screen.width, screen.height))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(watch.time, "monotonic", iter(range(1000)).__next__)  # no step comes too soon
    return screen


def masked(ids, *places):
    ids = ids.clone()
    ids[list(places)] = MASK
    return ids[None]


def test_redraws_in_place_wrapped_and_highlighted(tokenizer, terminal):
    text = "To be, or not to be,\nthat is 你好你好你好你好你好 the question"
    ids = torch.tensor(tokenizer(text)["input_ids"])
    count = len(ids)
    with DenoisingView(tokenizer, MASK, stream=terminal) as view:
        assert not terminal.cursor
        view(masked(ids, *range(count)), 0)
        assert terminal.text().count("░") == count and f"[step 1, {count} ma" in terminal.text()
        view(masked(ids, *range(1, count)), 1)
        first = tokenizer.decode(ids[:1])
        assert terminal.text().replace("\n", "").startswith(first + "░" * 5) and terminal.new == set(first)
        terminal.new.clear()
        view(ids[None], 2)
        assert set(first).isdisjoint(terminal.new - set(text[1:])) and "你" in terminal.new
    body, counter = terminal.text().rsplit("\n", 1)
    assert counter == "[step 3, 0 masked]" and terminal.cursor
    assert body == "To be, or not to be\n,\nthat is 你好你好你\n好你好你好 the ques\ntion"


def test_text_higher_than_the_terminal_shows_its_end(tokenizer, terminal):
    ids = torch.tensor(tokenizer("\n".join(f"line {i}" for i in range(30)))["input_ids"])
    with DenoisingView(tokenizer, MASK, stream=terminal) as view:
        for step in range(3):
            view(masked(ids, *range(2 - step)), step)
    assert terminal.text() == "\n".join(f"line {i}" for i in range(24, 30)) + "\n[step 3, 0 masked]"


def test_no_colour_and_erased_picture(tokenizer, terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    ids = torch.tensor(tokenizer("to be")["input_ids"])
    with DenoisingView(tokenizer, MASK, stream=terminal, keep=False) as view:
        for _ in range(2):  # batches
            view.begin(None)
            view(masked(ids, 0, 1), 0)
            view(masked(ids, 0), 1)
    assert terminal.text() == "" and terminal.cursor and not terminal.new


def test_an_error_gives_the_terminal_back(tokenizer, terminal):
    with pytest.raises(KeyboardInterrupt), DenoisingView(tokenizer, MASK, stream=terminal) as view:
        view(torch.tensor([[MASK, MASK]]), 0)
        raise KeyboardInterrupt
    assert terminal.cursor and terminal.text() == "░░\n[step 1, 2 masked]" and terminal.lines[-1] == []


def test_elsewhere_a_line_every_few_steps_and_the_last(tokenizer):
    ids, stream = torch.tensor(tokenizer("to be,\nor not")["input_ids"]), io.StringIO()
    with DenoisingView(tokenizer, MASK, stream=stream, every=4) as view:
        for step in range(len(ids)):
            view(masked(ids, *range(step + 1, len(ids))), step)
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    steps = [int(re.match(r"\[step (\d+), ", line)[1]) for line in lines]
    assert steps == sorted({*range(1, len(ids) + 1, 4), len(ids)})
    assert lines[-1] == f"[step {len(ids)}, 0 masked] to be, or not"


def test_padding_is_left_out_and_rows_are_limited(tokenizer):
    rows = torch.tensor([[50, 51, 0, MASK], [52, 53, 54, MASK], [55, 55, 55, 55]])
    attention = torch.tensor([[True, True, False], [True, True, True], [True, True, True]])
    stream = io.StringIO()
    with DenoisingView(tokenizer, MASK, attention_mask=attention, rows=2, stream=stream) as view:
        view(rows, 0)
    first, second = (line.split("] ")[1] for line in stream.getvalue().splitlines())
    assert first == tokenizer.decode([50, 51]) + "░" and second == tokenizer.decode([52, 53, 54]) + "░"


def test_characters_of_several_tokens(tokenizer):
    """Every way to mask the tokens of a text of 2-, 3- and 4-byte characters: pieces join to what is decoded."""
    view = DenoisingView(tokenizer, MASK, stream=io.StringIO())
    ids = [t for c in "éЖ語🚀" for t in tokenizer(c)["input_ids"]]
    assert len(ids) >= 8
    for pattern in range(2 ** len(ids)):
        row = [MASK if pattern >> i & 1 else token for i, token in enumerate(ids)]
        pieces = view.pieces(row, [MASK if i % 2 else token for i, token in enumerate(row)])
        runs = re.findall(r"m+|t+", "".join("m" if token == MASK else "t" for token in row))
        expected, start = "", 0
        for run in runs:
            part = row[start : start + len(run)]
            expected += "░" * len(run) if run[0] == "m" else tokenizer.decode(part)
            start += len(run)
        assert "".join(text for text, _ in pieces) == expected
    assert view.pieces(ids, ids) == [("éЖ語🚀", False)]
    assert view.pieces(ids, [MASK] * len(ids)) == [("éЖ語🚀", True)]


def test_spaces_of_sentencepiece_words():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "▁to": 1, "▁be": 2, "<mask>": 3}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    view = DenoisingView(PreTrainedTokenizerFast(tokenizer_object=words), MASK, stream=io.StringIO())
    assert "".join(text for text, _ in view.pieces([1, MASK, 2, 1], [1] * 4)) == "to░ be to"


def test_what_a_terminal_obeys_is_shown(tokenizer, terminal):
    """Control characters and marks of direction, in place and in lines; joiners and marks of letters as they are."""
    text = "a\x9b31m\x1b[2J\u202eb\u2066c\x07 क्\u200dष"
    ids = torch.tensor(tokenizer(text)["input_ids"])[None]
    stream = io.StringIO()
    for place in (terminal, stream):
        with DenoisingView(tokenizer, MASK, stream=place) as view:
            view(ids, 0)
    shown = r"a\x9b31m\x1b[2J\u202eb\u2066c\x07 क्" + "\u200dष"
    assert stream.getvalue() == f"[step 1, 0 masked] {shown}\n"
    assert terminal.text().rsplit("\n", 1)[0].replace("\n", "") == shown
    assert terminal_text.printable("tab\tline\n\ud800\u2028é你") == "tab\tline\n\\ud800\\u2028é你"
