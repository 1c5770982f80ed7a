"""The verb export, called in this process on all eight devices, in workdirs that hold a checkpoint and little else.

Exporting what was really trained is tried in `test_commands.py`; what transformers reads, in `models/test_hf.py`.
"""

import dataclasses
import json
import shutil

import bits
import jax
import meshes
import ml_dtypes
import numpy as np
import processes
import pytest
from safetensors import numpy as safetensors_numpy
import slow_decoder
import transformers

from configs import quickstart
from searchr1_jax import export
from searchr1_jax.core import settings
from searchr1_jax.models import catalog, decoder, hf, tensor_files
from searchr1_jax.run import checkpoint, evaluation, progress, run_directory
from searchr1_jax.text import tokenizer

MODEL = slow_decoder.tiny_config(vocab_size=304, width=32, tied_embeddings=False)
TEMPLATE = "{% for message in messages %}Q: {{ message['content'] }}\nA:{% endfor %}"
INDEX = "model.safetensors.index.json"


def trained(step):
    """The weights of a checkpoint, made up: policy and value model."""
    policy = slow_decoder.random_params(MODEL, step)
    return {"policy": policy, "value": slow_decoder.random_params(MODEL, 100 + step, decoder.Value)}


@pytest.fixture(scope="module")
def run(tagged_tokenizer, tmp_path_factory):
    """A workdir as training leaves it, without all that export can do without; not to be written to."""
    workdir, laptop = tmp_path_factory.mktemp("run") / "run", meshes.make()
    tagged_tokenizer.save(workdir / run_directory.TOKENIZER)
    templated = transformers.AutoTokenizer.from_pretrained(workdir / run_directory.TOKENIZER)
    templated.chat_template = TEMPLATE
    templated.save_pretrained(workdir / run_directory.TOKENIZER)
    with jax.set_mesh(laptop):
        checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=2)
        about = progress.About(
            model=catalog.to_hf(MODEL, dtype="float32"), base="Ada/base-2b", has_value_model=True, stream={},
            tools=["search", "note"], step=0, owed=None, course=progress.Course(kl_coefficient=0.0),
        )  # fmt: skip
        for step in (4, 6):
            trees = trained(step)
            placed = {
                "policy": slow_decoder.on_mesh(MODEL, trees["policy"]),
                "value": slow_decoder.on_mesh(MODEL, trees["value"], decoder.Value),
            }
            checkpoints.save(step, placed, dataclasses.replace(about, step=step).as_json())
        checkpoints.close()
    run_directory.claim(config(**{"learner.steps": 77}), workdir)
    return workdir


@pytest.fixture
def workdir(run, tmp_path):
    """A copy of the run."""
    return shutil.copytree(run, tmp_path / "run")


def config(**changes):
    return settings.Settings.of(quickstart.get_config()).replace({"log.compilation_cache": False} | changes)


@pytest.fixture
def exported(workdir, tmp_path):
    """exported(**flags) is the directory that the verb wrote."""

    def exported(**flags):
        output = flags.pop("output", tmp_path / "out" / "model")
        export.run(flags.pop("settings", config()), flags.pop("workdir", workdir), output, **flags)
        return output

    return exported


def files(directory):
    """Every file below a directory and its bytes."""
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_the_newest_checkpoint_is_exported_to_the_last_bit(exported, laptop):
    output = exported()
    assert hf.read_config(output) == MODEL
    bits.assert_equal(jax.device_get(hf.load(output)), trained(6)["policy"])
    assert not (output / "value").exists() and not (output / INDEX).exists()
    assert list(output.parent.iterdir()) == [output]


def test_another_step_is_exported_where_it_is_asked_for(exported, laptop):
    bits.assert_equal(jax.device_get(hf.load(exported(step=4))), trained(4)["policy"])


def test_the_tokenizer_comes_with_its_chat_template(exported, tagged_tokenizer):
    output = exported()
    theirs, ours = transformers.AutoTokenizer.from_pretrained(output), tokenizer.Tokenizer.load(output)
    assert theirs.chat_template == TEMPLATE and ours.eos_ids == tagged_tokenizer.eos_ids
    text = "<search> Emma </search>"
    assert theirs(text).input_ids == ours.encode(text) == tagged_tokenizer.encode(text)
    assert ours.decode(ours.encode_prompt("who?")) == "Q: who?\nA:"
    generation = json.loads((output / "generation_config.json").read_text())
    assert generation["eos_token_id"] == sorted(tagged_tokenizer.eos_ids)
    assert generation["stop_strings"] == ["</search>", "</note>", "</answer>"]


def test_bfloat16_is_written_where_it_is_asked_for(exported):
    output = exported(dtype="bfloat16", value=True)
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    assert {x.dtype for x in bits.stored(output).values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert {x.dtype for x in bits.stored(output / "value").values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_a_small_limit_gives_several_files_and_an_index(exported, laptop):
    limit = 20_000  # bytes; the embedding and the head take 304 x 32 x 4 = 38,912
    output = exported(max_shard_gb=limit / 1e9)
    weight_map = json.loads((output / INDEX).read_text())["weight_map"]
    written = sorted(output.glob("*.safetensors"))
    assert sorted(set(weight_map.values())) == [path.name for path in written] and len(written) > 3
    whole = sum(x.nbytes for x in jax.tree.leaves(trained(6)["policy"]))
    assert json.loads((output / INDEX).read_text())["metadata"] == {"total_size": whole}
    for path in written:
        tensors = safetensors_numpy.load_file(path)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= limit
    bits.assert_equal(jax.device_get(hf.load(output)), trained(6)["policy"])


def test_the_value_model_is_written_beside_the_policy(exported, laptop):
    output, models = exported(value=True), trained(6)
    bits.assert_equal(jax.device_get(hf.load(output)), models["policy"])
    bits.assert_equal(jax.device_get(hf.load(output / "value", kind=decoder.Value)), models["value"])


# The model card.


def test_the_card_tells_base_algorithm_step_and_config(exported):
    output = exported(step=4)
    card = (output / "README.md").read_text()
    front = card.split("---")[1]
    assert "base_model: Ada/base-2b\n" in front and "library_name: transformers\n" in front
    assert "# model\n" in card and "`Ada/base-2b`, trained by PPO for 4 steps" in card
    assert "It ends a turn with `</search>` or `</note>` or `</answer>`" in card
    assert "No evaluation of this run was found." in card
    told = json.loads(card.split("```json\n")[1].split("```")[0])
    assert told["learner"]["steps"] == 77  # the config of the run, not that of the command line
    assert told == config(**{"learner.steps": 77}).as_json()


def test_the_card_holds_the_figures_of_evaluations_but_not_those_made_while_training(exported, workdir):
    results = evaluation.Results(
        split="test", decoding="greedy", n=64, em=0.40625, em_over_sets=0.40625, f1=0.5, searches=1.25, calls={},
        response_tokens=90.0,
        em_by_hops={"1": 0.40625}, em_by_source={"": 0.40625}, stop_reasons={"answer": 64},
    )  # fmt: skip
    results.save(workdir / "eval" / "final-greedy.json")
    results.save(workdir / "eval" / "validation-greedy-step000004.json")
    (workdir / "eval" / "final-greedy.jsonl").write_text("{}\n")
    card = (exported() / "README.md").read_text()
    assert "| final-greedy | test | greedy | 64 | 0.406 | 1.25 |" in card
    assert "validation" not in card.split("## Config")[0] and "No evaluation" not in card


def test_the_card_of_grpo_says_so_and_there_is_no_value_model_to_write(exported, workdir, tmp_path):
    grpo = settings.Settings.of(quickstart.get_config("algorithm=grpo")).replace({"log.compilation_cache": False})
    (workdir / "config.json").unlink()  # the config of the command line stands in
    assert "trained by GRPO for 6 steps" in (exported(settings=grpo) / "README.md").read_text()
    extra = workdir / "checkpoints" / "6" / "extra" / "metadata"
    extra.write_text(json.dumps(json.loads(extra.read_text()) | {"has_value_model": False}))
    (extra.parents[1] / "manifest.json").unlink()
    with pytest.raises(ValueError, match="checkpoints/6 has no value model; leave out --value"):
        exported(settings=grpo, value=True, output=tmp_path / "other")


# Whole or not at all.


def test_what_is_there_is_not_overwritten_unless_that_is_asked_for(exported, laptop):
    output = exported(step=4)
    before = files(output)
    with pytest.raises(ValueError, match=f"{output} exists; choose another --output or add --overwrite"):
        exported()
    assert files(output) == before and list(output.parent.iterdir()) == [output]
    (output / "model.bin").write_text("of somebody else")
    assert exported(overwrite=True) == output
    bits.assert_equal(jax.device_get(hf.load(output)), trained(6)["policy"])
    assert files(output).keys() == before.keys()


def test_what_is_no_exported_model_is_never_overwritten(exported, workdir):
    before = files(workdir)
    with pytest.raises(ValueError, match="checkpoints exists and is no exported model"):
        exported(output=workdir / "checkpoints", overwrite=True)
    assert files(workdir) == before


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_an_export_that_failed(exported, monkeypatch, tmp_path, error):
    def full(path, *_):
        path.write_bytes(b"the first bytes")
        raise error

    monkeypatch.setattr(tensor_files, "_write_file", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(type(error)):
        exported()
    assert list((tmp_path / "out").iterdir()) == []


def test_what_was_there_survives_an_export_that_failed(exported, monkeypatch):
    output = exported(step=4)
    before = files(output)
    monkeypatch.setattr(hf, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exported(overwrite=True)
    assert files(output) == before and list(output.parent.iterdir()) == [output]


def test_what_a_killed_export_left_is_in_nobodys_way(exported, tmp_path):
    left = tmp_path / "out" / ".model.partial"
    left.mkdir(parents=True)
    (left / "model-00009-of-00009.safetensors").write_bytes(b"half")
    output = exported()
    assert not (output / "model-00009-of-00009.safetensors").exists() and not left.exists()


def test_a_step_that_was_not_kept_is_refused_and_leaves_nothing(exported, tmp_path):
    with pytest.raises(ValueError, match=r"holds steps \[4, 6\], not 5; .*another --step"):
        exported(step=5)
    assert not (tmp_path / "out").exists()


def test_two_processes_export_what_one_does(workdir, tmp_path):
    command = ["-m", "searchr1_jax.export", "--value", f"--workdir={workdir}", f"--output={tmp_path / 'two'}"]
    processes.finished(processes.start_verb_twice(command))
    with jax.set_mesh(meshes.make()):
        trees = trained(6)
        for part, kind, name in ((".", decoder.Policy, "policy"), ("value", decoder.Value, "value")):
            loaded = jax.device_get(hf.load(tmp_path / "two" / part, kind=kind))
            jax.tree.map(np.testing.assert_array_equal, loaded, trees[name])
