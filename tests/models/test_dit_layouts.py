"""facebookresearch/DiT's and diffusers' DiTs as training scripts leave them: wrappers, prefixes, shards, variants."""

import argparse
import json
import pathlib
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_dit_checkpoints import TOLERANCE, Harmful, PlainDiT, diffusers_model, inputs, randomised

import fastdiff
from fastdiff.diffusion import Diffusion, DiffusionConfig, sample_classes
from fastdiff.models import DiT, DiTConfig
from fastdiff.models.weights import WEIGHT_DTYPES, WRAPPERS


@pytest.fixture(scope="module")
def plain():
    return randomised(PlainDiT())


def assert_same(model, plain, **tolerance):
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs()), plain(*inputs()), **{**TOLERANCE, **tolerance})


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def zeros(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def compiled_blocks(state):
    return {name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in state.items()}


def lucidrains(state):
    """ema_pytorch's module: the model, its average and two counters."""
    other = prefixed(zeros(state), "online_model.")
    return {"initted": torch.tensor(True), "step": torch.tensor(5), **other, **prefixed(state, "ema_model.")}


LAYOUTS = {
    **{f"in {name!r}": lambda state, name=name: {name: state, "epoch": 3, "lr": 0.1} for name in WRAPPERS},
    "averaged weights first": lambda state: {"model": zeros(state), "optimizer": {"state": {}}, "ema": state},
    "ema_model beside state_dict": lambda state: {"state_dict": zeros(state), "ema_model": state},
    "nothing averaged": lambda state: {"model": state, "ema": None},
    "twice wrapped": lambda state: {"model": {"state_dict": state}},
    **{f"prefix {prefix}": lambda state, prefix=prefix: prefixed(state, prefix)
       for prefix in ("module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "ema_model.", "dit.",
                      "_fsdp_wrapped_module.", "model.diffusion_model.")},
    "Lightning": lambda state: {"state_dict": prefixed(state, "model."), "pytorch-lightning_version": "2"},
    "Lightning with an average": lambda state: {"state_dict": prefixed(zeros(state), "net.") | prefixed(state, "ema.")},
    "compiled blocks": compiled_blocks,
    "checkpointed blocks": lambda state: prefixed(state, "_checkpoint_wrapped_module."),
    "ema_pytorch": lucidrains,
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_wrapper_and_prefix_gives_the_same_output(plain, tmp_path, layout):
    torch.save(LAYOUTS[layout](plain.state_dict()), tmp_path / "a.pt")
    assert_same(DiT.from_pretrained(tmp_path / "a.pt", num_heads=4), plain)


def test_what_is_loaded_is_told(plain, tmp_path, caplog):
    torch.save({"model": zeros(plain.state_dict()), "ema": {"module": plain.state_dict()}}, tmp_path / "a.pt")
    with caplog.at_level("INFO", "fastdiff"):
        DiT.from_pretrained(tmp_path / "a.pt", num_heads=4)
    assert f"{tmp_path / 'a.pt'}: read the weights in ema.module" in caplog.text


@pytest.mark.parametrize(
    "content, message",
    [
        ({"ema": {"shadow_params": [torch.ones(2)], "decay": 0.9}}, r"a\.pt: ema: holds shadow_params \(list\), decay"),
        (
            {"generator": {"w": torch.ones(2)}, "step": 3},
            r"a\.pt: holds generator \(dict\), step \(int\), …; ex",
        ),
        ({}, r"a\.pt: holds nothing; expected tensors by name"),
        ({"model": {"model": {"model": {"model": {"model": {"w": torch.ones(1)}}}}}}, r"a\.pt: model\.model.*: holds"),
        ({"w": torch.ones(2, 2).to_sparse()}, r"w: got a tensor of torch.sparse_coo on cpu"),
        ({"module.w": torch.ones(2), "w": torch.ones(2)}, "w: got two tensors of the name w"),
        ({"w": torch.ones(1).expand(10**12)}, r"w: got shape \[1000000000000\]; the file has fewer numbers for it"),
        ([1, 2], r"a\.pt: holds a list; expected a state dict of a DiT"),
    ],
)
def test_a_file_that_holds_something_else_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message) as caught:
        DiT.from_pretrained(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


def test_unknown_missing_and_numbers_that_are_no_weights(plain, tmp_path):
    state, path = plain.state_dict(), tmp_path / "a.pt"
    name = "blocks.1.mlp.fc1.weight"
    changes = {
        "blocks.0.attn.norm_q.weight is unknown": {"blocks.0.attn.norm_q.weight": torch.ones(12)},
        "vae.weight is unknown": {"vae.weight": torch.ones(12)},
        f"{name} is missing": {name: None},
        f"{name} has shape": {name: torch.ones(3, 3)},
        f"{name} has dtype torch.int8, expected float32": {name: state[name].to(torch.int8)},
        f"{name} has dtype torch.float8_e4m3fn, expected": {name: state[name].to(torch.float8_e4m3fn)},
        f"{name} has dtype torch.complex64": {name: state[name].to(torch.complex64)},
    }
    for message, change in changes.items():
        torch.save({key: tensor for key, tensor in {**state, **change}.items() if tensor is not None}, path)
        with pytest.raises(ValueError) as caught:
            DiT.from_pretrained(path, num_heads=4)
        assert message in str(caught.value) and "a.pt" in str(caught.value)


def test_dtypes_by_name(plain, tmp_path):
    torch.save({name: tensor.to(torch.float16) for name, tensor in plain.state_dict().items()}, tmp_path / "a.pt")
    for dtype in WEIGHT_DTYPES:
        named = DiT.from_pretrained(tmp_path / "a.pt", num_heads=4, dtype=str(dtype).removeprefix("torch."))
        assert {p.dtype for p in named.parameters()} == {dtype}
    with pytest.raises(ValueError, match="dtype: got 'int8'; expected float32, bfloat16 or float16"):
        DiT.from_pretrained(tmp_path / "a.pt", num_heads=4, dtype="int8")
    diffusers_model().save_pretrained(tmp_path / "diffusers")
    assert DiT.from_pretrained(tmp_path / "diffusers", dtype="bfloat16").positions.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------ command lines


def test_a_command_line_with_paths_is_read_and_nothing_is_run(plain, tmp_path, capsys):
    """Paths of this and of another system, with pickle's name of either Python."""
    windows = pathlib.PureWindowsPath("C:/data")
    arguments = argparse.Namespace(model="DiT-S/2", num_classes=7, data=pathlib.Path("/data/x"), results=windows)
    torch.save({"model": plain.state_dict(), "args": arguments}, tmp_path / "a.pt")
    assert_same(DiT.from_pretrained(tmp_path / "a.pt", num_heads=4), plain)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        parts = {entry: archive.read(entry) for entry in archive.namelist()}
    pickled = next(entry for entry in parts if entry.endswith("data.pkl"))
    for old, new in ((b"cpathlib\nPosixPath", b"cpathlib._local\nPosixPath"), (b"PureWindowsPath", b"WindowsPath")):
        assert old in parts[pickled]
        parts[pickled] = parts[pickled].replace(old, new)
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        for entry, data in parts.items():
            archive.writestr(entry, data)
    assert_same(DiT.from_pretrained(tmp_path / "b.pt", num_heads=4), plain)
    arguments.callback = Harmful()
    torch.save({"model": plain.state_dict(), "args": arguments}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt: .*more than tensors in it; expected a PyTorch checkpoint of a DiT"):
        DiT.from_pretrained(tmp_path / "c.pt", num_heads=4)
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize("source", ["args", "a dict of them", "num_classes"])
def test_a_label_table_without_a_null_label(tmp_path, source):
    """class_dropout_prob 0: ten rows are ten classes."""
    ten = randomised(PlainDiT(classes=9, out_channels=4))
    content, options = {"model": ten.state_dict()}, {}
    if source == "args":
        content["args"] = argparse.Namespace(model="DiT-S/2", num_classes=10, image_size=64)
    elif source == "num_classes":
        options["num_classes"] = 10
    else:
        content["args"] = {"num_classes": 10}
    torch.save(content, tmp_path / "a.pt")
    model = DiT.from_pretrained(tmp_path / "a.pt", num_heads=4, **options)
    assert (model.config.num_classes, model.config.null_label, model.config.class_dropout_prob) == (10, False, 0)
    image, timestep, _ = inputs()
    labels = torch.tensor([0, 9, 5])
    with torch.no_grad():
        torch.testing.assert_close(model(image, timestep, labels), ten(image, timestep, labels), **TOLERANCE)
    with pytest.raises(ValueError, match=r"class_labels: got values 0..10; expected 0..9 \(there is no null label\)"):
        model(image, timestep, torch.tensor([0, 10, 5]))
    with pytest.raises(ValueError, match="class_labels: got None; this model has no null label"):
        model(image, timestep)
    with pytest.raises(ValueError, match="dropout_prob: got 0.1 without a null label; expected 0"):
        DiT.from_pretrained(tmp_path / "a.pt", num_heads=4, class_dropout_prob=0.1, **options)
    diffusion = Diffusion(DiffusionConfig("epsilon", "linear"))
    steps = dict(num_inference_steps=2)
    with pytest.raises(ValueError, match="guidance_scale: got 4 for a model that was trained without label dropout"):
        sample_classes(model, diffusion, [9], guidance_scale=4, **steps)
    with pytest.raises(ValueError, match=r"class_labels: got values 10..10; expected 0..9"):
        sample_classes(model, diffusion, [10], **steps)
    assert sample_classes(model, diffusion, [9], **steps).shape == (1, 4, 8, 8)
    model.save_pretrained(tmp_path / "again")
    again = DiT.from_pretrained(tmp_path / "again")
    assert again.config == model.config
    with pytest.warns(UserWarning, match="scheduler_config"):
        run = fastdiff.load(tmp_path / "again")
    assert run.sampling.guidance_scale == 1 and len(run.class_names) == 10


def test_numbers_of_classes_that_the_table_does_not_have(plain, tmp_path):
    torch.save({"model": plain.state_dict(), "args": argparse.Namespace(num_classes=1000)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"its args.num_classes: got 1000; its label table has 8 rows: expected 7 or"):
        DiT.from_pretrained(tmp_path / "a.pt", num_heads=4)
    assert DiT.from_pretrained(tmp_path / "a.pt", num_heads=4, num_classes=7).config.null_label
    with pytest.raises(ValueError, match=r" num_classes: got 9; its label table has 8 rows"):
        DiT.from_pretrained(tmp_path / "a.pt", num_heads=4, num_classes=9)
    with pytest.raises(ValueError, match="class_dropout_prob: got 0.1 without a null label; expected 0"):
        DiTConfig(null_label=False)


def test_a_file_without_positions(plain, tmp_path):
    state = {name: tensor for name, tensor in plain.state_dict().items() if name != "pos_embed"}
    torch.save({"model": state, "args": argparse.Namespace(image_size=64)}, tmp_path / "a.pt")
    model = DiT.from_pretrained(tmp_path / "a.pt", num_heads=4)
    assert model.config.image_size == (8, 8)
    assert_same(model, plain)
    torch.save(state, tmp_path / "b.pt")
    assert_same(DiT.from_pretrained(tmp_path / "b.pt", num_heads=4, input_size=8), plain)
    with pytest.warns(UserWarning, match=r"b\.pt: no pos_embed; assuming input_size 32, as of 256 x 256 pixels"):
        assert_same(DiT.from_pretrained(tmp_path / "b.pt", num_heads=4), plain)  # positions follow the sample's size


# ------------------------------------------------------------------------------------------------ diffusers' folders


def assert_diffusers(theirs, path, **options):
    image, timestep, labels = inputs()
    with torch.no_grad():
        expected = theirs(image, timestep=timestep, class_labels=labels).sample
        torch.testing.assert_close(DiT.from_pretrained(path, **options)(image, timestep, labels), expected, **TOLERANCE)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("safe", [True, False])
def test_variants_and_shards_of_either_kind(tmp_path, sharded, safe):
    theirs, size = diffusers_model(), {"max_shard_size": "100KB"} if sharded else {}
    theirs.save_pretrained(tmp_path, variant="fp16", safe_serialization=safe, **size)
    assert len([*tmp_path.iterdir()]) == (5 if sharded else 2) or sharded
    assert any("fp16" in path.name for path in tmp_path.iterdir())
    assert_diffusers(theirs, tmp_path)
    assert_diffusers(theirs, tmp_path, variant="fp16")
    with pytest.raises(FileNotFoundError, match="no weights of the variant 'bf16' in it"):
        DiT.from_pretrained(tmp_path, variant="bf16")
    other = diffusers_model(norm_eps=1e-5)
    torch.nn.init.normal_(other.proj_out_2.weight)
    other.save_pretrained(tmp_path, variant="ema", safe_serialization=safe)
    with pytest.raises(ValueError, match="has weights of the variants ema, fp16; pass variant="):
        DiT.from_pretrained(tmp_path)
    assert_diffusers(other, tmp_path, variant="ema")
    other.save_pretrained(tmp_path, safe_serialization=safe)
    assert_diffusers(other, tmp_path)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder, **changes):
    file = folder / "diffusion_pytorch_model.safetensors"
    state = {name: tensor for name, tensor in {**load_file(file), **changes}.items() if tensor is not None}
    save_file(state, file)


FC1, BLOCK = "transformer_blocks.1.ff.net.0.proj.weight", "transformer_blocks.1"


@pytest.mark.parametrize(
    "config, weights, message",
    [
        (dict(num_layers=1), {}, f"{BLOCK}.attn1.to_k.bias is unknown"),
        (dict(num_layers=4), {}, "transformer_blocks.3.norm1.emb.timestep_embedder.linear_1.weight' is missing"),
        (dict(num_layers=1e7), {}, "config.json: num_layers: got 10000000.0 with "),
        (dict(num_attention_heads=10**6), {}, "has shape"),
        (dict(num_embeds_ada_norm=9), {}, "y_embedder.embedding_table.weight has shape [8, 48], expected [10, 48]"),
        (dict(sample_size=10**6), {}, "input_size: got 1000000, 250000000000 tokens of 2 x 2 pixels"),
        ({}, {f"{BLOCK}.attn1.norm_q.weight": torch.ones(24)}, f"{BLOCK}.attn1.norm_q.weight is unknown"),
        ({}, {f"{BLOCK}.attn1.to_q.lora_A.weight": torch.ones(4, 48)}, "to_q.lora_A.weight is unknown"),
        ({}, {FC1: torch.ones(192, 48, dtype=torch.int8)}, "blocks.1.mlp.fc1.weight has dtype torch.int8"),
        (
            {},
            {f"{BLOCK}.attn1.to_q.weight": torch.ones(48, 48, dtype=torch.int8)},
            "attn1 has dtypes torch.int8",
        ),
        ({}, {FC1: None}, f"'{FC1}' is missing"),
        ({}, {"pos_embed.pos_embed": torch.ones(1, 16, 48)}, "pos_embed holds other positions"),
    ],
)
def test_a_diffusers_folder_that_does_not_fit_its_configuration(tmp_path, config, weights, message):
    diffusers_model().save_pretrained(tmp_path)
    edit_config(tmp_path, **config)
    if weights:
        edit_weights(tmp_path, **weights)
    with pytest.raises(ValueError) as caught:
        DiT.from_pretrained(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("embedders", ["equal", "different"])
def test_leftovers_are_unknown_however_embedders_are_kept(tmp_path, embedders):
    theirs = diffusers_model()
    if embedders == "equal":
        for block in theirs.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs.save_pretrained(tmp_path)
    assert_diffusers(theirs, tmp_path)
    edit_weights(tmp_path, **{"transformer_blocks.2.norm1.emb.extra.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"norm1.emb.extra.weight is unknown"):
        DiT.from_pretrained(tmp_path)


def test_positions_in_older_files_are_compared(tmp_path):
    theirs = diffusers_model()
    theirs.save_pretrained(tmp_path)
    edit_weights(tmp_path, **{"pos_embed.pos_embed": PlainDiT().positions()[None]})
    assert_diffusers(theirs, tmp_path)


# ------------------------------------------------------------------------------------------------ damaged and hostile


@pytest.mark.parametrize(
    "weight_map, kind, message",
    [
        (["a.safetensors"], ValueError, "weight_map: got list; expected names of shards by tensor"),
        ({}, ValueError, "weight_map: got dict; expected names"),
        ({"w": 3}, ValueError, "weight_map: got dict; expected names"),
        (
            {"w": "../../secret.safetensors"},
            ValueError,
            "the shard '../../secret.safetensors'; expected",
        ),
        ({"w": "/etc/passwd"}, ValueError, "got the shard '/etc/passwd'"),
        ({"w": "a\\b.safetensors"}, ValueError, "got the shard"),
        ({"w": "gone.safetensors"}, FileNotFoundError, "gone.safetensors: no such file; expected the shard that"),
    ],
)
def test_an_index_of_a_stranger(tmp_path, weight_map, kind, message):
    diffusers_model().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(kind) as caught:
        DiT.from_pretrained(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_tensor_in_two_shards(tmp_path):
    diffusers_model().save_pretrained(tmp_path, max_shard_size="100KB")
    first, second = sorted(tmp_path.glob("*-of-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: load_file(first)[name]}, second)
    with pytest.raises(ValueError, match=f"{second.name}: {name} is in another shard, too"):
        DiT.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", ["pt", "safetensors", "bin"])
@pytest.mark.parametrize(
    "content",
    [b"", b"junk", b"\x80\x02" + bytes(300), b"PK\x03\x04" + bytes(100), bytes(range(256)) * 9, b"\x00" * 10_000,
     struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 8) + b'{"a": 1}', b"{" * 5000, b"\x80\x04." * 100],
    ids=range(10),
)  # fmt: skip
def test_junk_is_one_line(tmp_path, suffix, content):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        DiT.from_pretrained(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_flipped_bytes_are_one_line_or_a_model(plain, tmp_path):
    torch.save(plain.state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    generator, path, refused = torch.Generator().manual_seed(0), tmp_path / "a.pt", 0
    for _ in range(30):
        content = bytearray(whole)
        for place in torch.randint(len(whole), (20,), generator=generator).tolist():
            content[place] ^= 1 << place % 8
        path.write_bytes(bytes(content[: len(content) if refused % 3 else -refused - 1]))
        try:
            DiT.from_pretrained(path, num_heads=4)
        except ValueError as error:
            refused += 1
            assert "a.pt" in str(error) and "\n" not in str(error)
    assert refused > 5


def test_an_archive_that_is_larger_inside_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1 << 20)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as archive,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in archive.namelist():
            bomb.writestr(entry, archive.read(entry))
    assert (tmp_path / "b.pt").stat().st_size < 20_000
    with pytest.raises(ValueError, match=r"b\.pt: .*a compressed archive"):
        DiT.from_pretrained(tmp_path / "b.pt")


def own_folder(path):
    config = DiTConfig(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    DiT(config).save_pretrained(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000 + "]" * 100_000, "config.json: not a JSON file"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "config.json: not a JSON file"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested more than 64 deep"),
        (b'{"\xff": 1}', "config.json: not a text in UTF-8"),
        (dict(depth=10**7), "config.json: depth: got 10000000 with 21 tensors"),
        (dict(hidden_size=1 << 20), "has shape"),
        (dict(hidden_size=1 << 30), "config.json: not the configuration of a DiT: Storage size calculation overflowed"),
        (dict(num_classes=1 << 62), "config.json: not the configuration of a DiT"),
        (dict(input_size=1 << 20), "input_size: got 1048576"),
        (dict(hidden_size="16"), "config.json: not the configuration of a DiT"),
        (dict(mlp_ratio=1e308), "config.json: not the configuration of a DiT"),
    ],
    ids=range(11),
)
def test_a_configuration_is_compared_before_anything_is_built(tmp_path, text, message):
    own_folder(tmp_path)
    if isinstance(text, dict):
        edit_config(tmp_path, **text)
    else:
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        DiT.from_pretrained(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
