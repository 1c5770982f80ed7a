"""Text to token ids and back, and the bytes that each token stands for.

    text ─ encode ─▶ ids          user message ─ encode_prompt ─▶ prompt ids
    ids ─ decode ─▶ text          token_bytes() ─▶ stop_table.build

`Tokenizer.load` wraps a Hugging Face tokenizer; `train` makes one from texts. The only file that imports
`transformers` and `tokenizers`, both lazily.
"""

from collections.abc import Callable, Iterable, Sequence
import copy
import datetime
import functools
import json
import os
import pathlib
import re
from typing import Any, Self

from searchr1_jax.core import settings
from searchr1_jax.text import protocol

EOS = "<|endoftext|>"  # of the tokenizers that `train` makes

# How Qwen2's tokenizer cuts text before merging. Where config.json says qwen2, `transformers` replaces the
# cut that tokenizer.json states by this one, so `train` uses it from the start.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A Hugging Face tokenizer whose decoding is its tokens' joined bytes, whatever its clean-up does."""

    def __init__(self, hugging_face: Any, eos_ids: Iterable[int] = ()):
        """Wraps a fast `transformers` tokenizer; `eos_ids` are the model's, next to the tokenizer's."""
        own = hugging_face.eos_token_id
        self.eos_ids = frozenset(eos_ids) | (frozenset() if own is None else {own})
        self._hugging_face = hugging_face
        # For text that is only text: "<|endoftext|>" inside a passage stays letters and ends nothing.
        self._plain = copy.deepcopy(hugging_face.backend_tokenizer)
        self._plain.encode_special_tokens = True
        self._plain.no_truncation()
        self._plain.no_padding()

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """The tokenizer of a directory; ValueError where there is none.

        The end-of-sequence ids are the tokenizer's and those of generation_config.json and config.json.
        """
        try:
            hugging_face = _import_transformers().AutoTokenizer.from_pretrained(path)
            return cls(hugging_face, _model_eos_ids(pathlib.Path(path)))
        except (OSError, ValueError) as error:
            raise ValueError(f"no tokenizer at {str(path)!r}; name one that holds tokenizer.json ({error})") from error

    def save(self, directory: str | os.PathLike):
        """Writes the files that `load` and `transformers.AutoTokenizer` read, the model's eos ids too."""
        self._hugging_face.save_pretrained(directory)
        if self.eos_ids:
            generation = pathlib.Path(directory) / "generation_config.json"
            generation.write_text(json.dumps({"eos_token_id": sorted(self.eos_ids)}) + "\n")

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included; a model's embedding may have more rows."""
        return max(self._hugging_face.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of `text` as plain text: added tokens (tags) are found in it, special tokens are not."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def framing(self, max_tokens: int) -> Callable[[Sequence[Any]], list[tuple[list[int], list[int]]]]:
        """A function that frames many texts, or pairs of texts, at once and in parallel: ids and token types of each.

        [CLS] text [SEP], or [CLS] first [SEP] second [SEP] whose second part is of type 1. What is longer than
        `max_tokens` is cut at its end, of a pair the longer of the two first.
        """
        framing = copy.deepcopy(self._plain)
        framing.encode_special_tokens = True  # which a copy forgets
        framing.enable_truncation(max_tokens)
        return lambda texts: [(encoding.ids, encoding.type_ids) for encoding in framing.encode_batch(texts)]

    def encode_prompt(self, user_message: str, templates: settings.Protocol = settings.Protocol()) -> list[int]:
        """The ids of a prompt, up to where the policy goes on writing.

        Through the chat template with a generation prompt where there is one; it writes every special token itself, and
        those that stand in the message stay plain text. Else the raw message with what the tokenizer puts in front of a
        text, and nothing behind it.

        Raises:
          ValueError: where the chat template does.
        """
        if self._hugging_face.chat_template:
            special = sorted(self._special_texts, key=len, reverse=True)
            message, marks = user_message, {f"\ue000{i}\ue001": text for i, text in enumerate(special)}
            for mark, text in marks.items():
                message = message.replace(text, mark)
            written = self._chat(message, templates)
            if message == user_message:
                return self._hugging_face.encode(written, add_special_tokens=False)
            pieces = re.split(f"({'|'.join(marks)})", written)
            encode = lambda text: self._hugging_face.encode(text, add_special_tokens=False)
            return [i for piece in pieces for i in (self.encode(marks[piece]) if piece in marks else encode(piece))]
        ids = self._plain.encode(user_message, add_special_tokens=True).ids
        return ids[:-1] if ids and ids[-1] in self.eos_ids else ids

    @functools.cached_property
    def _special_texts(self) -> tuple[str, ...]:
        added = self._hugging_face.backend_tokenizer.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    def _chat(self, user_message: str, templates: settings.Protocol) -> str:
        """What the chat template makes of a message, with a generation prompt."""
        messages = [{"role": "system", "content": templates.system}] if templates.system else []
        messages.append({"role": "user", "content": user_message})
        template = _today(templates.template_date) + self._hugging_face.get_chat_template()
        arguments = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
        try:
            return self._hugging_face.apply_chat_template(
                messages, **arguments, **protocol.template_arguments(templates)
            )
        except Exception as error:  # a template raises what it likes
            raise ValueError(
                f"the model's chat template fails: {type(error).__name__}: {error}; look at protocol.system and"
                " protocol.template_arguments, or at tokenizer_config.json"
            ) from error

    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes of each token, index = id; b"" for an id that no token has; ValueError for WordPiece."""
        return self._token_bytes

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens' joined bytes: U+FFFD where not UTF-8, nothing for an id without token."""
        pieces = self._token_bytes
        return b"".join(pieces[i] for i in ids if i < len(pieces)).decode(errors="replace")

    @functools.cached_property
    def _token_bytes(self) -> tuple[bytes, ...]:
        backend = self._hugging_face.backend_tokenizer
        decoders = _decoder_types(json.loads(backend.to_str())["decoder"])
        if "ByteLevel" in decoders:
            byte_of = _byte_of_character()
            piece_bytes = lambda piece: bytes(byte_of[character] for character in piece)
        elif decoders & {"Metaspace", "ByteFallback"}:
            piece_bytes = _metaspace_bytes
        else:
            raise ValueError(
                f"a tokenizer that decodes by {sorted(decoders)} has no bytes for single tokens; the policy "
                "needs byte-level BPE or SentencePiece"
            )
        added = backend.get_added_tokens_decoder()
        pieces = [b""] * self.vocab_size
        for piece, i in self._hugging_face.get_vocab().items():
            pieces[i] = added[i].content.encode() if i in added else piece_bytes(piece)
        return tuple(pieces)


def train(
    texts: Iterable[str], *, vocab_size: int, added_tokens: Sequence[str], directory: str | os.PathLike
) -> Tokenizer:
    """Trains byte-level BPE, saves it to `directory` and loads it from there.

    Any text encodes and comes back exactly; the same texts give the same tokenizer. Id 0 is the end of
    sequence, `<|endoftext|>`, a special token.

    Args:
      vocab_size: the number of tokens, added ones included; fewer where the texts hold no more merges.
      added_tokens: texts that are always one token and not special (the tags); they get the highest ids.
    """
    import tokenizers

    needed = 256 + 1 + len(added_tokens)
    if vocab_size < needed:
        raise ValueError(
            f"a vocabulary of {vocab_size} does not hold the 256 bytes, {EOS} and {len(added_tokens)} added "
            f"tokens; it needs at least {needed}"
        )
    pre_tokenizers = tokenizers.pre_tokenizers
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(added_tokens),
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([tokenizers.AddedToken(text, normalized=False, special=False) for text in added_tokens])
    fast = _import_transformers().PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)
    Tokenizer(fast).save(directory)
    return Tokenizer.load(directory)


@functools.cache
def _today(date: str) -> str:
    """What, put before a chat template, makes `strftime_now` tell this day; `transformers` would ask the clock."""
    told = datetime.date.fromisoformat(date)
    forms = {f"%{letter}": told.strftime(f"%{letter}") for letter in "aAbBdeHIjmMpSuUVwWyY"}
    written = "".join(f"|replace({form!r}, {text!r})" for form, text in forms.items())
    return f"{{% macro strftime_now(form) %}}{{{{ form{written} }}}}{{% endmacro %}}{{{{ '' }}}}"  # '' keeps a newline


def _import_transformers():
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # that PyTorch is missing is no news
    import transformers

    return transformers


def _model_eos_ids(directory: pathlib.Path) -> frozenset[int]:
    """Every `eos_token_id` of generation_config.json and config.json, which state one, several or none."""
    ids = frozenset()
    for file in (directory / "generation_config.json", directory / "config.json"):
        if file.exists():
            stated = json.loads(file.read_text()).get("eos_token_id")
            ids |= frozenset(stated) if isinstance(stated, list) else frozenset({stated} - {None})
    return ids


def _decoder_types(decoder: dict | None) -> set[str]:
    """The types of a decoder and of those it is made of, as tokenizer.json names them."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(_decoder_types, decoder.get("decoders", ())))


def _byte_of_character() -> dict[str, int]:
    """GPT-2's map from the 256 printable characters of its vocabulary to bytes (Radford et al., 2019).

    Printable bytes of Latin-1 stand for themselves; the others are numbered on from U+0100: " " is "Ġ".
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _metaspace_bytes(piece: str) -> bytes:
    """SentencePiece: "<0x0A>" is one byte, "▁" a space, everything else itself."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
