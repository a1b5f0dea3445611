"""`fastdiff info --diagram`."""

import xml.etree.ElementTree as ElementTree

import pytest
from language_runs import write_run

import fastdiff
from fastdiff import info
from fastdiff.models.autoencoder import AutoencoderConfig, make_autoencoder
from fastdiff.tasks.diagrams import process_of, save_diagrams

NAMES = ["model.svg", "block.svg", "process.svg"]


def texts(file):
    return [element.text for element in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")]


def test_a_run_is_drawn_beside_its_files(language_run, tmp_path, capsys):
    info.main(["--diagram", str(language_run), "--output", str(tmp_path / "new" / "folder")])
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / "new" / "folder" / name) for name in NAMES]
    model = fastdiff.load(language_run).model
    total = f"{sum(p.numel() for p in model.parameters()):,} parameters".replace(",", " ")
    assert any(text.startswith(f"{total} · {language_run} · step 3 · averaged weights") for text in texts(printed[0]))
    assert "new tokens: 12 in 2 blocks of 6" in texts(printed[2])
    assert save_diagrams(str(language_run))[0] == language_run / "diagrams" / "model.svg"


def test_the_masks_left_are_those_of_decoding(tmp_path):
    """Two blocks of six tokens, three steps each: two tokens a step."""
    generation = {"max_new_tokens": 12, "block_length": 6, "num_inference_steps": 6}
    run = fastdiff.load(write_run(tmp_path / "even", generation=generation))
    assert process_of(run).left == pytest.approx([1 - n / 6 for n in range(7)])
    generation |= {"unmasking_rule": "ancestral", "num_inference_steps": 4}
    run = fastdiff.load(write_run(tmp_path / "ancestral", generation=generation))
    assert process_of(run).left == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    run = fastdiff.load(write_run(tmp_path / "rule", generation={"max_new_tokens": 12, "unmasking_rule": "threshold"}))
    process = process_of(run)
    assert not process.left and any("rule threshold 0.9" in fact for fact in process.sampling)


def test_a_saved_model_without_a_process_has_two_files(tmp_path):
    model = make_autoencoder(AutoencoderConfig(in_channels=1, sample_size=16, block_out_channels=[8, 8],
                                               norm_num_groups=4))  # fmt: skip
    model.save_pretrained(tmp_path / "vae")
    files = save_diagrams(str(tmp_path / "vae"), str(tmp_path / "out"))
    assert [file.name for file in files] == NAMES[:2]
    assert "image B × 1 × 16 × 16" in texts(files[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x"], "error: --output: got 'x' without --diagram; expected a RUN to draw"),
        (["--diagram", "no/such/run/here"], "error: "),
        (["--diagrams", "x"], "error: unrecognized arguments: --diagrams x; --help lists what there is"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        info.main(arguments)
    written = capsys.readouterr().err
    assert error.value.code == 2 and written.startswith(message) and written.count("\n") == 1


def test_a_file_in_the_folders_place_is_refused_before_work(language_run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        info.main(["--diagram", str(language_run), "--output", str(tmp_path / "file")])
    assert "got a file; expected the name of a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
