"""fastdiff.load: any kind, wherever it lies; what is saved samples as it did; what cannot be loaded is one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from language_runs import byte_tokenizer
from models.test_dit_checkpoints import PlainDiT, diffusers_model, randomised
from tasks.conftest import KINDS
from torch.testing import assert_close

import fastdiff
from fastdiff import generate, sample


def drawn(run):
    """What a run of each kind gives, without saying how: as its recipe does."""
    if run.kind == "dit":
        return run.sample([3, "7"], output_type="pt")
    if run.kind == "masked_lm":
        return torch.tensor(run.generate("12", max_new_tokens=8, seed=1)[0].tokens)
    if run.kind == "qgfd":
        return run.sample(num_samples=3).batch["numbers"]
    return run.model(torch.linspace(-1, 1, 2 * run.model.hidden_size).view(2, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_and_a_checkpoint_alone_sample_as_the_run(runs, kind, tmp_path):
    run = fastdiff.load(runs / kind, device="cpu")
    assert run.kind == kind and run.step == 3 and run.weights == "ema" and not run.model.training
    expected = drawn(run)
    run.save_pretrained(tmp_path / "saved")
    saved = fastdiff.load(str(tmp_path / "saved"), device="cpu")
    assert saved.kind == kind and saved.folder is None and saved.weights is None
    assert torch.equal(drawn(saved), expected)
    newest = runs / kind / "checkpoints" / "step_3"
    assert torch.equal(drawn(fastdiff.load(newest, device="cpu")), expected)
    alone = fastdiff.load(shutil.copytree(newest, tmp_path / "alone"), device="cpu")
    assert alone.step == 3 and alone.folder is None and torch.equal(drawn(alone), expected)
    plain = fastdiff.load(runs / kind, weights="model", device="cpu")
    assert plain.weights == "model"
    other = fastdiff.load(tmp_path / "alone", weights="model", device="cpu").model.state_dict()
    states = [each.model.state_dict() for each in (run, plain)]
    assert all(torch.equal(other[name], tensor) for name, tensor in states[1].items())
    assert any(not torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert fastdiff.load(runs / kind / "checkpoints" / "step_2", device="cpu").step == 2


def test_what_a_saved_folder_knows(runs, tmp_path):
    for kind in KINDS:
        fastdiff.load(runs / kind, device="cpu").save_pretrained(tmp_path / kind)
    dit, lm, qgfd, head = (
        (fastdiff.load(runs / kind, device="cpu"), fastdiff.load(tmp_path / kind, device="cpu")) for kind in KINDS
    )
    for run, saved in (dit, qgfd):
        assert saved.sampling == run.sampling == run.recipe.sampling and saved.sampling.num_inference_steps == 2
        assert saved.mixed_precision == run.mixed_precision == "no"
    assert dit[1].class_names == tuple("0123456789") and dit[1].diffusion.config == dit[0].recipe.diffusion
    assert qgfd[1].schema == qgfd[0].schema
    assert lm[1].tokenizer.get_vocab() == lm[0].tokenizer.get_vocab()
    assert lm[1].decoding == {"max_new_tokens": 32, **lm[0].decoding}  # blocks of 8, of the model's 40 positions
    assert lm[1].generate("", seed=1)[0].tokens == lm[0].generate("", seed=1)[0].tokens
    assert head[1].about["model_hash"] == head[0].about["model_hash"]


def test_recipes_ways_of_sampling_go_with_the_folder(runs, tmp_path):
    lm = fastdiff.load(runs / "masked_lm", device="cpu")
    lm.decoding.update(max_new_tokens=6, block_length=3, unmasking_rule="threshold", threshold=0.5)
    lm.save_pretrained(tmp_path / "lm")
    saved = fastdiff.load(tmp_path / "lm", device="cpu")
    assert saved.decoding == lm.decoding
    assert saved.generate("12")[0].tokens == lm.generate("12")[0].tokens
    assert saved.generate("12", unmasking_rule="count", seed=1)  # the threshold goes with the rule
    with pytest.raises(ValueError, match="threshold"):
        saved.generate("12", unmasking_rule="count", threshold=0.5)
    dit = fastdiff.load(runs / "dit", device="cpu")
    dit.sampling.guidance_interval = (0.2, 0.8)
    dit.save_pretrained(tmp_path / "dit")
    assert fastdiff.load(tmp_path / "dit", device="cpu").sampling == dit.sampling


def test_the_commands_take_a_saved_folder(runs, tmp_path, capsys):
    for kind in ("dit", "masked_lm"):
        fastdiff.load(runs / kind, device="cpu").save_pretrained(tmp_path / kind)
    picture = tmp_path / "grid.png"
    sample.main([str(tmp_path / "dit"), "--labels", "3", "--images-per-label", "1", "--output", str(picture)])
    assert picture.is_file()
    capsys.readouterr()
    generate.main([str(tmp_path / "masked_lm"), "--prompt", "12", "--max-new-tokens", "8", "--seed", "1"])
    assert "12" in capsys.readouterr().out


def test_foreign_images(tmp_path):
    theirs = diffusers_model()
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer")
    names = {"id2label": {str(label): f"thing, {label}" for label in range(7)}}
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"} | names))
    theirs.save_pretrained(tmp_path / "transformer")
    torch.save(randomised(PlainDiT(dim=384, depth=1, heads=6)).state_dict(), tmp_path / "DiT-S-2.pt")
    torch.save(randomised(PlainDiT()).state_dict(), tmp_path / "narrow.pt")
    for name, fields in (("pipeline", {}), ("transformer", {}), ("DiT-S-2.pt", {}), ("narrow.pt", {"num_heads": 4})):
        with pytest.warns(UserWarning, match="assuming the process of the published DiT checkpoints"):
            run = fastdiff.load(tmp_path / name, device="cpu", **fields)
        assert run.kind == "dit" and len(run.class_names) == 7
        assert run.sample([1], num_inference_steps=1, output_type="pt").shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="got a model of latents with 4 channels and no decoder"):
        run.sample([1])
    with pytest.warns(UserWarning):
        run = fastdiff.load(tmp_path / "pipeline", device="cpu")
    images = [run.sample(each, num_inference_steps=1, output_type="pt") for each in ("thing, 2", [2], 2)]
    assert torch.equal(images[0], images[1]) and torch.equal(images[1], images[2])
    run.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        fastdiff.load(tmp_path / "saved").sample([2], num_inference_steps=1, output_type="pt"), images[1]
    )


@pytest.mark.parametrize("kind", ["gpt2", "llada"])
def test_foreign_language_models(kind, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        fields = dict(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1)
        GPT2LMHeadModel(GPT2Config(**fields, eos_token_id=2)).save_pretrained(tmp_path)
    else:
        from models.test_masked_lm_checkpoints import llada_checkpoint

        llada_checkpoint(tmp_path, vocab_size=60)
        (tmp_path / "tokenizer.json").unlink()
        _words_tokenizer().save_pretrained(tmp_path)
    # another project's defaults are none of ours
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7, "max_length": 50}')
    run = fastdiff.load(tmp_path, device="cpu")
    assert run.kind == "masked_lm" and run.decoding == {} and run.model.config.architecture == kind
    tokens = run.generate("", max_new_tokens=4, seed=1)[0].tokens
    run.save_pretrained(tmp_path / "saved")
    assert fastdiff.load(tmp_path / "saved", device="cpu").generate("", max_new_tokens=4, seed=1)[0].tokens == tokens


def _words_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {**{f"w{index}": index for index in range(57)}, "<eos>": 57, "<mask>": 58}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>", pad_token="<eos>", mask_token="<mask>"
    )


def fails(match: str, call, *arguments, kind: type[Exception] = ValueError, **options) -> None:
    with pytest.raises(kind, match=match) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)


def test_what_is_no_model(runs, tmp_path, monkeypatch):
    missing = FileNotFoundError
    fails("no config.yaml and no config.json in it", fastdiff.load, tmp_path, kind=missing)
    (tmp_path / "dit_mnist").mkdir()
    fails(r"no such folder in .*did you mean dit_mnist", fastdiff.load, tmp_path / "dit_mnst", kind=missing)
    fails("no such folder; expected a run", fastdiff.load, tmp_path / "a" / "b" / "c", kind=missing)
    monkeypatch.chdir(tmp_path.parent)
    fails("no such folder in", fastdiff.load, f"{tmp_path.name}/nothing", kind=missing)  # no hub id: a path
    fails("no such checkpoint; expected one of step_2, step_3", fastdiff.load,
          runs / "dit" / "checkpoints" / "step_9", kind=missing)  # fmt: skip
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    fails(r"config\.yaml is missing", fastdiff.load, tmp_path / "run", kind=missing)
    shutil.copy(runs / "dit" / "config.yaml", tmp_path / "run")
    fails("has no checkpoint yet", fastdiff.load, tmp_path / "run", kind=missing)
    note = tmp_path / "note.txt"
    note.write_text("no model")
    fails("got a file; expected a folder", fastdiff.load, note)
    fails("not a facebookresearch|cut short, damaged", fastdiff.load, note.rename(tmp_path / "note.pt"))
    fails("got one file of a folder", fastdiff.load, runs / "dit" / "config.yaml")
    fails("got one file of a folder", fastdiff.load, runs / "dit" / "checkpoints" / "step_3" / "ema.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    fails("a model of type 'bert'; expected one of", fastdiff.load, tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    fails("_class_name: got 'UNet2DModel'; expected one of DiT", fastdiff.load, tmp_path)
    (tmp_path / "config.json").write_text("{")
    fails("not a JSON file", fastdiff.load, tmp_path)


def test_arguments_that_do_not_fit(runs):
    run = runs / "dit"
    fails("weights: got 'x'; expected 'ema' or 'model'", fastdiff.load, run, weights="x")
    fails("device: got 'cuda:7'", fastdiff.load, run, device="cuda:7")
    fails("device: got 'tpu'; expected cpu", fastdiff.load, run, device="tpu")
    fails("dtype: got an option that a QGFD", fastdiff.load, runs / "qgfd", dtype="bfloat16", kind=TypeError)
    fails("num_heads: cannot be changed", fastdiff.load, run, num_heads=2, kind=TypeError)
    fails("dtype: got 'int8'", fastdiff.load, runs / "masked_lm", dtype="int8")
    loaded = fastdiff.load(run, device="cpu")
    fails("labels: got 'cat'; expected 0 to 9", loaded.sample, ["cat"])
    fails("labels: got 10; expected 0 to 9", loaded.sample, [10])
    fails("labels: got -1", loaded.sample, -1)
    for truth in (True, [True, False]):  # Python's 1 and 0, which nobody means as classes
        fails("labels: got .*True.*; expected class labels or names", loaded.sample, truth, kind=TypeError)
    fails("classes: got none", loaded.sample, [])
    fails("output_type: got 'np'", loaded.sample, [1], output_type="np")
    fails("num_images_per_class: got 0", loaded.sample, [1], num_images_per_class=0)
    fails("num_inference_steps: got 0", loaded.sample, [1], num_inference_steps=0)
    fails("guidance_scale: got nan", loaded.sample, [1], guidance_scale=float("nan"))
    fails("generate: got a run of dit, which has none; use .sample", loaded.generate, "x", kind=TypeError)
    head = fastdiff.load(runs / "length_head", device="cpu")
    fails("sample: got a run of length_head, which has none; use its .model", head.sample, kind=TypeError)
    lm = fastdiff.load(runs / "masked_lm", device="cpu")
    fails("prompts: got 0", lm.generate, [])
    fails("num_samples: got 0", lm.generate, "1", num_samples=0)
    fails("temprature", lm.generate, "1", temprature=1)


def test_a_kind_that_another_loader_was_asked_for(runs):
    from fastdiff.tasks.dit.run import load_run as load_dit
    from fastdiff.tasks.length_head.run import load_run as load_head
    from fastdiff.tasks.masked_lm.run import load_language_model
    from fastdiff.tasks.qgfd.run import load_run as load_qgfd

    for loader, path in (
        (load_dit, "qgfd"),
        (load_qgfd, "dit"),
        (load_head, "masked_lm"),
        (load_language_model, "dit"),
    ):
        fails("got a.*; expected a.*; fastdiff.load loads any kind", loader, runs / path)


def test_saved_ways_of_sampling_that_were_damaged(runs, tmp_path):
    fastdiff.load(runs / "dit", device="cpu").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"mixed_precision": "fp8"}, "config.json: mixed_precision: got 'fp8'; expected one of auto, bf16, no"),
        ({"sampling": {"steps": 3}}, "config.json: not the configuration of .*steps"),
        ({"sampling": {"num_inference_steps": 0}}, "config.json: .*num_inference_steps: got 0"),
        ({"id2label": {"0": "a"}}, "id2label: got 1 names; expected those of 0 to 9"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        fails(message, fastdiff.load, tmp_path, device="cpu")
    older = {name: value for name, value in config.items() if name not in ("sampling", "mixed_precision")}
    (tmp_path / "config.json").write_text(json.dumps(older))
    run = fastdiff.load(tmp_path, device="cpu")
    assert run.sampling == type(run.sampling)() and run.mixed_precision == "auto"


def test_a_checkpoint_of_before_needs_its_run(old_runs, tmp_path):
    alone = shutil.copytree(old_runs / "dit" / "checkpoints" / "step_2", tmp_path / "alone")
    fails(
        "without scheduler_config.json; expected it in its run's folder", fastdiff.load, alone, kind=FileNotFoundError
    )


def test_many_classes_are_not_all_listed():
    from fastdiff.tasks.labels import label_of, parse_labels

    names = [f"animal {index}, common" for index in range(1000)]
    assert parse_labels(names[7], names) == [7] and parse_labels("3, 999", names) == [3, 999]
    with pytest.raises(ValueError, match="0 to 999 or a class's name, such as 'animal") as error:
        label_of("animal 77 common", names)
    assert len(str(error.value)) < 200
    with pytest.raises(ValueError, match="expected 0 to 1 or one of cat, dog"):
        label_of("bird", ["cat", "dog"])
    assert label_of("1", ["1", "0"]) == 0 and label_of(1, ["1", "0"]) == 1  # a name first; a number is a label


def test_images_of_a_run_are_pil_images(runs):
    run = fastdiff.load(runs / "dit", device="cpu")
    images = run.sample([3, 5], num_images_per_class=2)
    assert [image.size for image in images] == [(8, 8)] * 4 and {image.mode for image in images} == {"L"}
    tensors = run.sample([3, 5], num_images_per_class=2, output_type="pt")
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    assert torch.equal(pixels, ((tensors[:, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    again = run.sample([5], seed=run.sampling.seed + 3, output_type="pt")
    assert_close(again[0], tensors[3], rtol=1e-4, atol=1e-4)


def test_import_stays_light():
    code = "import fastdiff, sys; loaded = set(sys.modules); fastdiff.load; print(*loaded)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"transformers", "diffusers", "huggingface_hub", "jsonargparse", "yaml", "matplotlib", "PIL"}
    assert "fastdiff" in loaded and not heavy & set(loaded)
    assert not [name for name in loaded if name.startswith(("fastdiff.tasks", "fastdiff.training", "fastdiff.models"))]


def test_saving_mixes_no_files(runs, tmp_path):
    dit = fastdiff.load(runs / "dit", device="cpu")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".git").mkdir()
    dit.save_pretrained(tmp_path / "mine")
    dit.save_pretrained(tmp_path / "mine")  # again, as people do
    before = {path: path.read_bytes() for path in (runs / "dit").rglob("*") if path.is_file()}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for folder, run in (
        (tmp_path / "other", dit),
        (runs / "dit", dit),
        (dit.source, dit),  # a checkpoint, whose files stay as they were written
        (tmp_path / "mine", fastdiff.load(runs / "masked_lm", device="cpu")),
    ):
        with pytest.raises(FileExistsError, match="directory: got .*, which holds .*; expected a new or empty folder"):
            run.save_pretrained(folder)
    assert {path: path.read_bytes() for path in before} == before
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_files_of_a_saved_model_lie_with_it(runs, tmp_path, monkeypatch, capsys):
    from fastdiff import sample
    from fastdiff.tasks.results import results_folder

    fastdiff.load(runs / "dit", device="cpu").save_pretrained(tmp_path / "saved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sample.main([str(tmp_path / "saved"), "--labels", "0", "--images-per-label", "1"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "saved" / "samples-seed-0.png")
    assert not list(Path().iterdir())
    assert results_folder("owner/model", None) == Path()


def test_texts_of_digits_are_names_where_all_texts_are_names():
    from fastdiff.tasks.labels import labels_of, parse_labels

    names = ["1", "10", "2", "3"]
    assert parse_labels("0,1,2,3", names) == [0, 1, 2, 3] == labels_of(["0", "1", "2", "3"], names)
    assert parse_labels("1,10,2", names) == [0, 1, 2] == labels_of(["1", "10", "2"], names)
    assert parse_labels("10", names) == [1] == labels_of("10", names) and labels_of(1, names) == [1]
    assert parse_labels("cat,1", ["dog", "cat"]) == [1, 1] and labels_of(torch.tensor([1, 0]), names) == [1, 0]
    synonyms = ["crane, bird", "crane, machine", "tench, Tinca tinca"]
    assert parse_labels("Tinca tinca", synonyms) == [2] and parse_labels("tench,bird", synonyms) == [2, 0]
    with pytest.raises(ValueError, match="labels: got 'crane'; expected 0 to 2 or one of"):  # of two classes
        parse_labels("crane", synonyms)
    with pytest.raises(ValueError, match="labels: got '10'; expected 0 to 3"):
        parse_labels("0,10", names)  # 0 is no name, so that both are numbers


def test_numbers_of_numpy_and_torch_are_taken_as_numbers(runs):
    run = fastdiff.load(runs / "dit", device="cpu")
    expected = run.sample([1], num_inference_steps=2, seed=3, output_type="pt")
    for label in (np.int64(1), torch.tensor(1), np.array([1]), torch.tensor([1])):
        drawn = run.sample(label, num_inference_steps=np.int64(2), seed=np.int32(3), output_type="pt")
        assert torch.equal(drawn, expected)
    assert len(run.sample(1, num_images_per_class=np.int64(2), num_inference_steps=2)) == 2


def test_a_file_in_the_place_of_a_folder(runs, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="directory: got .*file', which is a file; expected a folder"):
        fastdiff.load(runs / "dit", device="cpu").save_pretrained(tmp_path / "file")
