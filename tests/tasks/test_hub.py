"""push_to_hub and fastdiff.load("user/name") for every kind, against a stand-in for the Hugging Face Hub."""

import re
import time

import pytest
import torch
from huggingface_hub import ModelCard, constants
from tasks.conftest import KINDS
from tasks.hub_server import OWNER, TOKEN
from tasks.test_load import drawn, fails

import fastdiff
from fastdiff import sample

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(runs, hub, kind, capfd):
    run = fastdiff.load(runs / kind, device="cpu")
    address = run.push_to_hub(f"tiny-{kind}", private=True)
    repo = f"{OWNER}/tiny-{kind}"
    assert re.fullmatch(rf"{hub.url}/{repo}/commit/\w{{40}}", address)
    assert hub.commits[repo] == ["Upload with fastdiff"] and hub.private[repo]
    files = hub.repositories[repo]
    assert {WEIGHTS, "config.json", "README.md"} <= files.keys() and "trainer_state.json" not in files
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "fastdiff" and kind in card.data.tags
    assert f"# {repo}\n" in card.text and f'fastdiff.load("{repo}")' in card.text
    again = fastdiff.load(repo, device="cpu")
    assert again.kind == kind and torch.equal(drawn(again), drawn(run))
    again.push_to_hub(repo, commit_message="Once more")
    assert hub.commits[repo] == ["Upload with fastdiff", "Once more"]
    assert ModelCard(files["README.md"].decode()).text == card.text  # a card knows more than a loaded folder
    if kind == "dit":  # the commands read hub ids, too
        sample.main([repo, "--labels", "3", "--images-per-label", "1", "--output", str(runs / "grid.png")])
        assert (runs / "grid.png").is_file()


def test_other_projects_repositories(hub, tmp_path):
    from models.test_dit_checkpoints import diffusers_model
    from tasks.test_pipelines import autoencoder

    diffusers_model().save_pretrained(tmp_path)
    files = hub.repositories[f"{OWNER}/pipeline"] = {
        f"transformer/{path.name}": path.read_bytes() for path in tmp_path.iterdir()
    }
    autoencoder().save_pretrained(tmp_path / "vae")
    files |= {f"vae/{path.name}": path.read_bytes() for path in (tmp_path / "vae").iterdir()}
    files |= {"model_index.json": b'{"_class_name": "DiTPipeline"}', "vae/x.py": b"raise"}
    with pytest.warns(UserWarning, match="assuming the process of the published"):
        run = fastdiff.load(f"{OWNER}/pipeline", device="cpu")
    assert run.model.config.num_classes == 7 and run.decoder is not None
    assert not any(request.endswith("x.py") for request in hub.requests)


def test_language_models_with_older_weights(runs, hub, tmp_path):
    from safetensors.torch import load_file

    run = fastdiff.load(runs / "masked_lm", device="cpu")
    run.save_pretrained(tmp_path)
    from models.test_masked_lm_checkpoints import llada_checkpoint
    from tasks.test_load import _words_tokenizer

    llada_checkpoint(tmp_path / "llada")
    _words_tokenizer().save_pretrained(tmp_path / "llada")
    torch.save(load_file(tmp_path / "llada" / WEIGHTS), tmp_path / "llada" / "pytorch_model.bin")
    names = [path for path in (tmp_path / "llada").iterdir() if path.name != WEIGHTS]
    hub.repositories[f"{OWNER}/llada"] = {path.name: path.read_bytes() for path in names} | {"x.py": b"raise"}
    loaded = fastdiff.load(f"{OWNER}/llada", device="cpu")
    assert loaded.model.config.architecture == "llada" and loaded.generate("", max_new_tokens=2, seed=0)
    assert not any(request.endswith("x.py") for request in hub.requests)


def test_a_model_once_loaded_is_there_without_the_hub(runs, hub, monkeypatch):
    run = fastdiff.load(runs / "dit", device="cpu")
    run.push_to_hub("tiny")
    fastdiff.load(f"{OWNER}/tiny", device="cpu")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert torch.equal(drawn(fastdiff.load(f"{OWNER}/tiny", device="cpu")), drawn(run))


def test_what_cannot_be_loaded_from_the_hub(hub, monkeypatch):
    gone = FileNotFoundError
    fails("nobody/nothing: not a local folder, and could not be downloaded from the Hugging Face Hub: .*has no such "
          "repository, or a private one", fastdiff.load, "nobody/nothing", kind=gone)  # fmt: skip
    hub.repositories[f"{OWNER}/empty"] = {"notes.txt": b"x"}
    fails("no config.yaml and no config.json in it", fastdiff.load, f"{OWNER}/empty", kind=gone)
    hub.repositories[f"{OWNER}/other"] = {"config.json": b'{"_class_name": "UNet2DModel"}'}
    fails("_class_name: got 'UNet2DModel'; expected one of DiT", fastdiff.load, f"{OWNER}/other")
    hub.failing = 503
    fails("answered 503", fastdiff.load, f"{OWNER}/other2", kind=gone)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    started = time.monotonic()
    fails("http://127.0.0.1:9 cannot be reached", fastdiff.load, "nobody/nothing", kind=gone)
    assert time.monotonic() - started < 15  # asked once: with huggingface_hub's retries it would be 23 s and more


def test_what_cannot_be_uploaded(runs, hub, monkeypatch, tmp_path):
    run = fastdiff.load(runs / "length_head", device="cpu")
    fails("repo_id: got 'a/b/c'; expected name or owner/name", run.push_to_hub, "a/b/c")
    fails("push_to_hub: x--y: .*", run.push_to_hub, "x--y")  # huggingface_hub's own rules for names
    fails("push_to_hub: stranger/x: .*answered 403 .*don't have the rights.*hf auth login", run.push_to_hub,
          "stranger/x", kind=PermissionError)  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1] + "y")
    fails("push_to_hub: x: .*answered 401", run.push_to_hub, "x", kind=PermissionError)
    monkeypatch.delenv("HF_TOKEN")
    fails("got no login at .*run hf auth login, or set HF_TOKEN", run.push_to_hub, "x", kind=PermissionError)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.failing = 500
    fails("push_to_hub: x: .*answered 500", run.push_to_hub, "x", kind=ConnectionError)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    fails("push_to_hub: x: http://127.0.0.1:9 cannot be reached", run.push_to_hub, "x", kind=ConnectionError)
    assert not hub.repositories


def test_links_that_lead_nowhere_and_names_no_file_has_are_no_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    for path in ("loop", "gone", "loop/model", str(tmp_path / "gone")):
        with pytest.raises(FileNotFoundError, match="(loop|gone): got a link to '(loop|nowhere)', which leads nowhere"):
            fastdiff.load(path)
    with pytest.raises(FileNotFoundError, match="path: got 'x{40}' and more, 300 characters"):
        fastdiff.load("x" * 300)
    with pytest.raises(FileNotFoundError, match="x: no such folder in"):  # longer than any name on the hub
        fastdiff.load("x" * 100)


def test_a_text_encoder_comes_from_the_hub(hub, tmp_path):
    import transformers
    from tokenizers_of_kinds import gpt2_like

    from fastdiff.models import TextEncoderConfig, load_text_encoder

    tokenizer = gpt2_like("red cat")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=len(tokenizer))
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    hub.repositories[f"{OWNER}/tiny"] = files | {"flax_model.msgpack": b"x", "onnx/model.onnx": b"x"}
    found, own = (load_text_encoder(TextEncoderConfig(name, layers=[1])) for name in
                  (f"{OWNER}/tiny", str(tmp_path / "model")))  # fmt: skip
    assert found.fingerprint == own.fingerprint
    assert torch.equal(found.encode(["red cat"])[0], own.encode(["red cat"])[0])
    assert not any("onnx" in request or "msgpack" in request for request in hub.requests)
    with pytest.raises(FileNotFoundError, match=f"name: got '{OWNER}/nothing', which cannot be had .*; expected smol"):
        load_text_encoder(TextEncoderConfig(f"{OWNER}/nothing"))
