"""Every setting of a run, once: name, type, default, meaning, and the rules it has.

    Settings() ─ configs/base.py ─▶ ConfigDict ─ config files, sweeps, --config.section.key=value ─▶ Settings.of(config)

A command begins with `Settings.of`, and each part takes its section (`settings.rollout`, …). What must hold of one key
stands beside it; what must hold between keys is in `run.checks`; names that a table resolves are checked by the table.

The rules of a key, or of a whole section:

    least, above, most    of a number, or of each number of a tuple
    choices, ascending, holds    of a word; of the numbers of a tuple; the placeholders of a template
    resume    whether it may change when a run goes on:
                  FREE        yes: what is learned does not depend on it
                  LAST_BITS   yes, and it is said: results are the same but for rounding
                  ACCEPTED    with --accept_changes, which records the change and its step
                  FIXED       no: it would be another run
    base      decides what `sft` makes, which runs of a sweep may share; a LIMIT is heeded by `sft` too, but a sweep
              makes all its bases with the limits of its plain config
    acting    decides how a policy acts
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import difflib
import json
import math
import re
import types
import typing
from typing import Any, Self, TypeVar

FREE, LAST_BITS, ACCEPTED, FIXED = "free", "last bits", "accepted", "fixed"
LIMIT = "limit"
DTYPES = ("float32", "bfloat16", "float16")

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_Section = TypeVar("_Section", bound=type)


def key(default: Any, **rules: Any) -> Any:
    """A key of a section: its default and the rules that are its own, in place of those of the section."""
    return dataclasses.field(default=default, metadata=rules)


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def section(**rules: Any) -> Callable[[_Section], _Section]:
    """A frozen dataclass of keys; the rules hold for each key that does not say otherwise."""

    def decorate(cls: _Section) -> _Section:
        cls.rules = types.MappingProxyType({"resume": FIXED, "base": False, "acting": False} | rules)
        return dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    return decorate


@section()
class Data:
    """Relative paths are looked up in the workdir first, then in the current directory."""

    # Question files (id, question, golden_answers a line), "name=path" each; the name, without one the file's own,
    # stands before the ids.
    train: tuple[str, ...] = key(("train.jsonl",))
    validation: tuple[str, ...] = key(("validation.jsonl",), resume=FREE)
    test: tuple[str, ...] = key(("test.jsonl",), resume=FREE)
    corpus: str = key("corpus.jsonl")  # id, contents: the title, a line break, the text
    demonstrations: tuple[str, ...] = key((), resume=FREE, base=True)  # for sft; empty: made from the invented world


@section()
class Model:
    path: str = key("base")  # Hugging Face directory or hub id: what training starts from, and the KL's reference
    # "package.module:NAME" of a family of one's own (docs/models.md); empty: a row of models.catalog.FAMILIES, by the
    # model_type of config.json.
    family: str = key("", base=True)
    param_dtype: str = key(
        "float32", choices=DTYPES, base=True
    )  # of the weights; what is learned is float32, its moments too
    compute_dtype: str = key("float32", choices=DTYPES, resume=ACCEPTED, base=True)  # of the learner's arithmetic
    reference_dtype: str = key("float32", choices=DTYPES, resume=ACCEPTED)  # of the reference's weights
    # Of the rollout's copy of the weights, its arithmetic and its KV caches.
    actor_dtype: str = key("float32", choices=DTYPES, resume=LAST_BITS)
    attention: str = key("auto", resume=LAST_BITS)  # over packed rows: "auto", "xla", "cudnn" or "splash"
    remat: bool = key(False, resume=LAST_BITS)  # recompute layers in the backward pass


@section(resume=LAST_BITS)
class Mesh:
    data: int = 1  # replicas; -1: all remaining devices
    fsdp: int = -1  # shards of weights and rows
    tensor: int = 1  # shards of heads, feed-forward width and vocabulary
    actor_tensor: int = key(1, least=1)  # the same, of each host's copy that acts; its other devices share the slots


@section(resume=ACCEPTED, base=True, acting=True)
class Protocol:
    """The templates of a run; the defaults are the texts of Search-R1 to the letter (Jin et al., 2025, table 1)."""

    prompt: str = key(  # the user's message
        "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get new"
        " information. After reasoning, if you find you lack some knowledge, you can call a search engine by <search>"
        " query </search> and it will return the top searched results between <information> and </information>. You"
        " can search as many times as your want. If you find no further external knowledge needed, you can directly"
        " provide the answer inside <answer> and </answer>, without detailed illustrations. For example, <answer>"
        " Beijing </answer>. Question: {question}\n",
        holds=("question",),
    )
    system: str = ""  # the system's message, of models with a chat template; empty: what the template puts there
    # Other arguments of the chat template, "name=value" with JSON or a text, e.g. "enable_thinking=false", and the day
    # that it takes for today, so that prompts do not change with the calendar.
    template_arguments: tuple[str, ...] = key(())
    template_date: str = "2024-07-26"
    correction: str = key(  # after a turn without a valid action
        "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>."
        " If I want to give the final answer, I should put the answer between <answer> and </answer>. Let me try"
        " again.\n",
        holds=(),
    )
    information: str = key("\n\n<information>{docs}</information>\n\n", holds=("docs",))  # after a search
    # One retrieved passage; {i} and {title} where wanted.
    passage: str = key("Doc {i}(Title: {title}) {text}\n", holds=("text",), may_hold=("i", "title"))


@section(resume=ACCEPTED, acting=True)
class Retriever:
    # A server that speaks the Search-R1 protocol, http://… (several, with commas: where one fails the next is asked),
    # or a search engine of the web: "serpapi", "google", "brave". Empty: an index in this process.
    url: str = key("", resume=FREE)
    # A directory that searchr1_jax.index built; "package.module:function", called with the settings and the workdir;
    # or "scann", "exact", "auto" (ScaNN where it has a wheel, else exact): made of data.corpus at each start, for
    # corpora of up to some 100,000 passages.
    index: str = "auto"
    dimensions: int = key(256, least=1)  # of the hashed n-gram vectors of an index made at the start
    search: str = ""  # of a built index: "scann", "exact", "bm25", "hybrid"; empty: hybrid where it can be
    reranker: str = ""  # Hugging Face directory or hub id of a cross-encoder, over a built index
    candidates: int = key(50, least=1)  # passages that it reorders
    rows_dtype: str = ""  # of the rows that exact search holds: "float32", "bfloat16", "int8"; empty: as on disk
    # "record": answers are kept and reused; "replay": they alone, without the engine.
    cache: str = key("off", choices=("off", "record", "replay"))
    cache_file: str = "queries.sqlite"  # in the workdir
    threads: int = key(2, least=1, resume=FREE)  # worker threads that wait for searches
    timeout_s: float = key(30.0, above=0, resume=FREE)  # of one request to a server, or of one search in this process
    attempts: int = key(4, least=1, resume=FREE)  # requests before a search has failed
    backoff_s: float = key(1.0, least=0, resume=FREE)  # before the second attempt; doubles with each


@section(resume=ACCEPTED, acting=True)
class Rollout:
    questions: int = key(512, least=1, resume=FIXED)  # a step
    samples: int = key(1, least=1)  # trajectories a question: G of GRPO
    max_turns: int = key(4, least=0)  # turns whose call of a tool is answered; one more turn follows
    max_turn_tokens: int = key(500, least=1)  # tokens that the policy writes in one turn
    max_information_tokens: int = key(500, least=1, base=True)  # tokens of one reply's body, e.g. of its passages
    context_tokens: int = key(4096, least=1, base=LIMIT)  # tokens of an episode, prompt included
    passages: int = key(3, least=1, base=True)  # of a search
    temperature: float = key(1.0, above=0)
    top_k: int = key(0, least=0)  # 0: all tokens
    top_p: float = key(1.0, above=0, most=1)
    slots: int = key(256, least=1, resume=LAST_BITS)  # sequences that decode together
    decode_tokens: int = key(32, least=1, resume=LAST_BITS)  # steps of one decode call
    extend_rows: int = key(16, least=1, resume=LAST_BITS)  # sequences that one extend call appends to
    extend_chunks: tuple[int, ...] = key((64, 512), least=1, ascending=True, resume=LAST_BITS)  # tokens of such a call


@section(resume=ACCEPTED)
class Reward:
    name: str = "exact_match"  # a key of text.rewards.REWARDS or package.module:function
    structure: float = 0.2  # of format_aware: what the form is worth
    retrieval: float = 0.0  # of format_aware: bonus of a well-formed wrong answer whose passages hold a right one
    answered: float = 0.1  # of format_aware: a wrong answer in a malformed episode
    extra: tuple[str, ...] = ()  # "name=weight" each, added to it; weight 0: only logged
    threads: int = key(4, least=1, resume=FREE)  # that call it, as episodes finish, while others still run


@section(resume=ACCEPTED)
class Algorithm:
    # A row of learning.advantages.ADVANTAGES or package.module:name. Of tokens: "gae" (with a value model), "return";
    # within the samples of a question: "group_standardised", "group_mean", "leave_one_out", "reward", "turn_returns".
    advantage: str = key("gae", resume=FIXED)
    discount: float = key(1.0, least=0, most=1)  # γ
    gae_lambda: float = key(1.0, least=0, most=1)  # λ
    whiten: bool = True  # advantages of tokens, once a rollout
    drop_equal_groups: bool = False  # leave out questions whose samples were all rewarded alike
    # A row of learning.losses.POLICY_LOSSES or package.module:name. "ppo_clip"; "gspo_clip": the ratio of a token is
    # that of its trajectory.
    policy_loss: str = "ppo_clip"
    clip_low: float = key(0.2, least=0)  # the ratio of probabilities counts from 1 - clip_low …
    clip_high: float = key(0.2, least=0)  # … to 1 + clip_high
    dual_clip: float = key(0.0, least=0)  # largest multiple of a negative advantage in ppo_clip; 0: no limit
    importance_cap: float = key(0.0, least=0)  # weight tokens by min(π_old / μ, this), μ the sampler's; 0: do not
    value_clip: float = key(0.5, least=0)
    # "token_mean", "sequence_mean", or "constant": over constant_tokens a trajectory.
    aggregation: str = key("token_mean", choices=("token_mean", "sequence_mean", "constant"))
    constant_tokens: int = key(0, least=0)  # 0: (rollout.max_turns + 1) x rollout.max_turn_tokens
    kl_coefficient: float = key(0.001, least=0)  # β; 0: no reference model at all
    kl_in: str = key("reward", choices=("reward", "loss"))
    kl_estimator: str = "k1"  # a row of learning.losses.KL: "k1", "k2", "k3"
    kl_target: float = key(0.0, least=0)  # nats a token that the coefficient adapts to; 0: it is fixed
    kl_horizon: int = key(10000, least=1)  # trajectories in which it adapts
    entropy_coefficient: float = 0.001
    mask_environment: bool = True  # False: learn from retrieved tokens too (an ablation)
    mask_estimates: bool = True  # False: GAE, whitening and value loss see retrieved tokens, as first published


@section(resume=ACCEPTED)
class Learner:
    steps: int = key(500, least=1)  # rollouts
    updates_per_rollout: int = key(2, least=1)  # mini-batches
    # Into mini-batches: "questions", their samples together; or "trajectories", as first published.
    minibatch_by: str = key("questions", choices=("questions", "trajectories"))
    # Of packed rows: the shortest that holds all; the last at least rollout.context_tokens.
    row_tokens: tuple[int, ...] = key((1024, 2048, 4096), least=1, ascending=True, resume=LAST_BITS, base=LIMIT)
    # Rows whose gradient is taken at once.
    micro_batch_rows: int = key(16, least=1, resume=LAST_BITS, base=LIMIT)
    # Positions of each row whose logits exist at once; divides row_tokens.
    vocab_chunk: int = key(64, least=1, resume=LAST_BITS)
    # What waits in the memory of the host while not in use.
    offload: tuple[str, ...] = key((), choices=("reference", "optimizer"), resume=FREE)
    value_warmup_steps: int = key(0, least=0)  # first rollouts that train the value model only


@section(resume=ACCEPTED)
class Guard:
    """A figure of a step beyond its limit is reported; 0: no limit."""

    kl: float = key(0.0, least=0)  # nats a token, to the reference
    entropy_low: float = key(0.0, least=0)  # nats a token
    entropy_high: float = key(0.0, least=0)
    gradient_norm: float = key(0.0, least=0)  # of the policy, before clipping
    rollbacks: int = key(0, least=0)  # times that the run then goes back to its last checkpoint with half the rates


@section(resume=ACCEPTED)
class Optimizer:
    learning_rate: float = key(1e-6, above=0)  # after warm-up
    warmup_steps: int = key(0, least=0)  # linear; counted in rollouts (in sft: in updates)
    final_lr_fraction: float = key(1.0, least=0)  # of the learning rate, reached linearly at the last step
    b1: float = key(0.9, least=0, most=1)
    b2: float = key(0.999, least=0, most=1)
    weight_decay: float = key(0.01, least=0)
    max_gradient_norm: float = key(1.0, above=0)


@section(resume=FREE)
class Evaluation:
    first: bool = True  # before training
    every: int = key(50, least=0)  # steps; 0: never during training
    questions: int = key(0, least=0)  # of each validation file, each time; 0: all
    decoding: tuple[str, ...] = ("greedy",)  # "greedy", "sampled" (at the rollout's temperature)


@section(resume=FREE)
class Checkpoint:
    every: int = key(50, least=0)  # steps; 0: at the end only
    minutes: float = key(15.0, above=0)  # and as soon as a step ends after so many without one
    keep: int = key(2, least=1)  # newest checkpoints


@section(resume=FREE)
class Cluster:
    """Of several processes; nothing here concerns one that runs alone."""

    start_s: int = key(600, least=1)  # how long the first to come waits for the last
    heartbeat_s: int = key(60, least=10)  # after which a process that died, or a host that is gone, ends the others
    stalled_s: float = key(1800.0, above=0)  # after which one that does nothing ends all; compiling may take minutes


@section(resume=FREE)
class Log:
    trajectories_every: int = key(50, least=0)  # steps whose trajectories are written; 0: none
    compilation_cache: bool = True  # JAX's persistent cache, in the user's cache directory


@section(base=True)
class World:
    """The invented world and the tiny model for it (`prepare`); unused with real data and models."""

    seed: int = key(0, least=0)
    persons: int = key(3000, least=1)
    companies: int = key(2000, least=1)
    hops: int = key(2, choices=(2, 3))  # searches of the longest chains; 3: persons advise companies
    namesakes: int = key(1, least=1)  # persons of each name, told apart by their profession
    paraphrased: bool = False  # nested phrases; validation and test ask in others than training
    vocab_size: int = 1024  # of the tokenizer trained on the corpus
    width: int = key(64, least=1)
    layers: int = key(3, least=1)
    heads: int = key(4, least=1)
    kv_heads: int = key(2, least=1)
    mlp_width: int = key(192, least=1)
    rope_theta: float = key(1000.0, above=0)


@section(resume=FREE, base=True)
class Sft:
    model: str = "init"  # Hugging Face directory that supervised training starts from
    output: str = "base"  # Hugging Face directory that it writes
    seed: int = key(0, least=0)
    steps: int = key(1000, least=1)  # with data.demonstrations
    min_reward: float = 0.0  # of files: trajectories rewarded less are left out; those without a reward stay
    drill_steps: int = key(0, least=0)  # single moves in the invented world …
    mixture_steps: int = key(0, least=0)  # … then whole episodes, most of them bad, in these shares:
    mixture_right: float = key(0.3, least=0)  # searches along the path, then the right answer
    mixture_guess: float = key(0.5, least=0)  # answers at once, with a random answer of the right kind
    mixture_wrong_entity: float = key(0.05, least=0)  # searches for somebody else first, then answers from that
    mixture_stopped_early: float = key(0.15, least=0)  # of two hops or more: answers what the first passage says
    guess_weight: float = key(0.3, least=0)  # loss weight of an invented answer's content
    content_weight: float = key(1.0, least=0)  # loss weight between the tags of a call or an answer
    batch: int = key(64, least=1)  # demonstrations a step
    optimizer: Optimizer = Optimizer(learning_rate=1e-5, warmup_steps=20)


@section()
class Settings:
    """All of a run. Raises ValueError for the first key that breaks its own rules, with the value and the remedy."""

    seed: int = key(0, least=0)  # of learning: order of questions and sampling; the world and sft have their own
    # What the policy may call: rows of run.tools.TOOLS or package.module:Class; none: it can but answer.
    tools: tuple[str, ...] = key(("search",), base=True, acting=True)

    data: Data = Data()
    model: Model = Model()
    mesh: Mesh = Mesh()
    protocol: Protocol = Protocol()
    retriever: Retriever = Retriever()
    rollout: Rollout = Rollout()
    reward: Reward = Reward()
    algorithm: Algorithm = Algorithm()
    learner: Learner = Learner()
    guard: Guard = Guard()
    policy: Optimizer = Optimizer(learning_rate=1e-6, warmup_steps=143)
    value: Optimizer = Optimizer(learning_rate=1e-5, warmup_steps=8)
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    cluster: Cluster = Cluster()
    log: Log = Log()
    world: World = World()
    sft: Sft = Sft()

    def __post_init__(self):
        for each in keys(self):
            each.check()

    @classmethod
    def of(cls, config: Any) -> Self:
        """The settings that a ConfigDict or a JSON object holds; what it leaves out has its default.

        Raises:
          ValueError: for a key that there is not, naming the nearest, or a value of another type.
        """
        return _read(cls(), config if isinstance(config, Mapping) else config.to_dict(), "")

    def replace(self, changes: Mapping[str, Any]) -> Self:
        """The settings with other values, by dotted key. Raises ValueError as `of` does."""
        tree: dict[str, Any] = {}
        for name, value in changes.items():
            *path, last = name.split(".")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[last] = value
        return _read(self, tree, "")

    def as_json(self) -> dict[str, Any]:
        """A JSON object of the same shape; `of` reads it back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


# Names that keys had before.
RENAMED = {
    "algorithm.trace_decay": "algorithm.gae_lambda",
    "learner.cut_by": "learner.minibatch_by",
    "policy.final_share": "policy.final_lr_fraction",
    "value.final_share": "value.final_lr_fraction",
    "sft.optimizer.final_share": "sft.optimizer.final_lr_fraction",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """A key of some settings, with its value and its rules."""

    name: str  # dotted
    value: Any
    rules: Mapping[str, Any]

    def check(self) -> None:
        """Raises ValueError where the value breaks a rule."""
        value, rules = self.value, self.rules
        each = value if isinstance(value, tuple) else (value,)
        least, above, most = (rules.get(name) for name in ("least", "above", "most"))
        if any(isinstance(v, float) and not math.isfinite(v) for v in each):
            raise ValueError(f"{self.name} is {value}; set a finite number")
        if least is not None and any(v < least for v in each):
            raise ValueError(f"{self.name} is {value}; set it to at least {least}")
        if above is not None and any(v <= above for v in each):
            raise ValueError(f"{self.name} is {value}; set it above {above}")
        if most is not None and any(v > most for v in each):
            raise ValueError(f"{self.name} is {value}; set it to at most {most}")
        if (choices := rules.get("choices")) and any(v not in choices for v in each):
            raise ValueError(f"{self.name} is {value!r}; choose from {list(choices)}")
        if rules.get("ascending") and (not value or list(value) != sorted(set(value))):
            raise ValueError(f"{self.name} is {value}; give at least one number, each larger than the one before")
        if (holds := rules.get("holds")) is not None:
            check_template(self.name, str(value), holds, rules.get("may_hold", ()))


def check_template(name: str, template: str, holds: tuple[str, ...], may_hold: tuple[str, ...] = ()) -> None:
    """Raises ValueError for a `{placeholder}` that is missing, repeated or unknown; other braces are braces."""
    found = _PLACEHOLDER.findall(template)
    for wanted in holds:
        if found.count(wanted) != 1:
            raise ValueError(f"{name} is {template!r}; put {{{wanted}}} into it, exactly once")
    for unknown in sorted(set(found) - {*holds, *may_hold}):
        known = ", ".join(f"{{{each}}}" for each in (*holds, *may_hold)) or "no placeholder"
        raise ValueError(f"{name} is {template!r} with an unknown {{{unknown}}}; it takes {known}")


def keys(settings: Settings) -> Iterator[Key]:
    """Every key, in the order in which they are declared."""
    return _keys(settings, "", {})


def _keys(record: Any, prefix: str, outer: Mapping[str, Any]) -> Iterator[Key]:
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        # A section inside another one (sft.optimizer) is what that one is.
        rules = record.rules | outer | dict(field.metadata)
        if dataclasses.is_dataclass(value):
            inside = {name: rules[name] for name in ("resume", "base", "acting")} if prefix else {}
            yield from _keys(value, f"{prefix}{field.name}.", inside)
        else:
            yield Key(name=prefix + field.name, value=value, rules=rules)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _read(record: Any, given: Mapping[str, Any], prefix: str) -> Any:
    hints, changes = typing.get_type_hints(type(record)), {}
    for name, value in given.items():
        dotted = prefix + name
        if name not in hints:
            raise ValueError(unknown_key(dotted))
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{dotted} is {value!r}, and it is a section; set the keys in it")
            changes[name] = _read(getattr(record, name), value, f"{dotted}.")
        else:
            changes[name] = _typed(dotted, value, hints[name])
    return dataclasses.replace(record, **changes)


def unknown_key(name: str) -> str:
    """What to say of a key that there is not."""
    if name in RENAMED:
        return f"the key {name} is now called {RENAMED[name]}"
    near = difflib.get_close_matches(name, [each.name for each in keys(Settings())], n=1)
    return f"the config has no key {name}" + (f"; did you mean {near[0]}?" if near else "")


def _typed(name: str, value: Any, wanted: Any) -> Any:
    """The value as the type that is wanted: a list may stand for a tuple, and an integer for a float."""
    if typing.get_origin(wanted) is tuple:
        inner = typing.get_args(wanted)[0]
        if isinstance(value, (tuple, list)):
            return tuple(_typed(name, each, inner) for each in value)
        raise ValueError(f"{name} is {value!r}; make it a tuple of type {inner.__name__}")
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or isinstance(value, bool) and wanted is not bool:
        raise ValueError(f"{name} is {value!r}; make it of type {wanted.__name__}")
    return value
