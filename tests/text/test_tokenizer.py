import json
import random

import pytest
import tokenizers
import transformers

from searchr1_jax.core import settings
from searchr1_jax.text import protocol, stop_table, tokenizer

TAGS, STOP_TAGS = protocol.tags(("search",)), protocol.stop_tags(("search",))
TEXTS = [
    "Ada Lovelace is a poet born in Zürich.",
    "Acme Labs was founded by Ada Lovelace. It makes boats in Rome.",
    "Where was the founder of Acme Labs born? 東京, 1815\n",
] * 10
VOCAB_SIZE = 320

# Anything may stand in a question or a passage.
PIECES = [
    "Ada", "Acme Labs", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\x00", "1815", "é", "e\u0301", "東", "😀",
    "▁", "Ġ", "<0x0A>", "<s>", "<|endoftext|>", "<|im_end|>", "<search>", "</search>", "</answer>\n", "</",
    "<", ">", "\ufffd",
]  # fmt: skip


def nasty_texts(count):
    rng = random.Random(0)
    return ["", *("".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(count))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    arguments = dict(vocab_size=VOCAB_SIZE, added_tokens=TAGS, directory=directory)
    return tokenizer.train(TEXTS, **arguments), directory


def with_special_tokens(trained, *, template, chat_template=None):
    """The trained tokenizer with a beginning of sequence and what it puts around a text, as Llama's has."""
    fast = transformers.AutoTokenizer.from_pretrained(trained[1])
    fast.add_special_tokens({"bos_token": "<|bos|>"})
    special = [("<|bos|>", fast.bos_token_id), (tokenizer.EOS, fast.eos_token_id)]
    fast.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=special
    )
    fast.chat_template = chat_template
    return tokenizer.Tokenizer(fast)


def sentencepiece_like():
    """The shape of Llama 2's and Gemma's: "▁" for spaces, bytes where the vocabulary has no letter."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "<", ">", "é"]
    model = tokenizers.models.BPE(
        {word: i for i, word in enumerate(words)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens(["</search>"])
    return tokenizer.Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


def word_pieces():
    """The shape of BERT's, which text encoders have."""
    words = ["[UNK]", "[CLS]", "[SEP]", "who", "wrote", "em", "##ma"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    backend.enable_truncation(3)  # as files from the hub may have; it is ours to cut
    return tokenizer.Tokenizer(
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
        )
    )


def test_any_text_comes_back_exactly(trained):
    for text in nasty_texts(500):
        assert trained[0].decode(trained[0].encode(text)) == text


def test_transformers_loads_what_train_saved(trained):
    fast = transformers.AutoTokenizer.from_pretrained(trained[1])
    assert len(fast) == trained[0].vocab_size == VOCAB_SIZE
    assert fast.all_special_tokens == [tokenizer.EOS] and fast.eos_token_id == 0
    for text in TEXTS[:3] + ["<think>Ada</think>\n<search> Acme </search>"]:
        assert fast.encode(text) == trained[0].encode(text)
        assert fast.decode(trained[0].encode(text)) == text


def test_training_learns_merges_and_is_deterministic(trained, tmp_path):
    assert len(trained[0].encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2
    arguments = dict(vocab_size=VOCAB_SIZE, added_tokens=TAGS, directory=tmp_path)
    tokenizer.train(TEXTS, **arguments)
    assert (tmp_path / "tokenizer.json").read_bytes() == (trained[1] / "tokenizer.json").read_bytes()


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocabulary of 264 .* at least 265"):
        tokenizer.train(TEXTS, vocab_size=264, added_tokens=TAGS, directory=tmp_path)


def test_tags_are_single_tokens_and_special_tokens_are_never_read_from_text(trained):
    tags = [trained[0].encode(tag) for tag in TAGS]
    assert tags == [[i] for i in range(VOCAB_SIZE - 8, VOCAB_SIZE)]
    assert trained[0].encode("a<search>b") == trained[0].encode("a") + tags[2] + trained[0].encode("b")
    ids = trained[0].encode(f"Ada{tokenizer.EOS}")
    assert 0 not in ids and trained[0].decode(ids) == "Ada<|endoftext|>"
    assert trained[0].decode([0]) == "<|endoftext|>"


def test_byte_level_tokens_stand_for_their_bytes(trained):
    pieces = trained[0].token_bytes()
    assert len(pieces) == VOCAB_SIZE
    assert {bytes([byte]) for byte in range(256)} <= set(pieces)
    assert pieces[0] == b"<|endoftext|>" and pieces[-8:] == tuple(tag.encode() for tag in TAGS)
    id_of = transformers.AutoTokenizer.from_pretrained(trained[1]).convert_tokens_to_ids
    # GPT-2 numbers the 68 bytes that don't print from U+0100 on: 0 to 32, 127 to 160, 173.
    for piece, byte in {"!": 33, "ÿ": 255, "Ā": 0, "Ċ": 10, "Ġ": 32, "ġ": 127, "ł": 160, "Ń": 173}.items():
        assert pieces[id_of(piece)] == bytes([byte])
    assert pieces[id_of("ĠLabs")] == b" Labs"


def test_sentencepiece_tokens_stand_for_their_bytes():
    tok = sentencepiece_like()
    pieces = tok.token_bytes()
    assert pieces[2:258] == tuple(bytes([byte]) for byte in range(256))
    assert pieces[258:] == (b" ", b"a", b"b", b" a", b"<", b">", "é".encode(), b"</search>")
    ids = tok.encode("b a é\n東</search>")
    assert [pieces[i] for i in ids[:5]] == [b"b", b" a", b" ", "é".encode(), b"\n"]
    assert tok.decode(ids) == "b a é\n東</search>"
    assert tok.decode(tok.encode("東")[:2]) == "\ufffd"


def test_word_pieces_have_no_bytes_of_their_own():
    with pytest.raises(ValueError, match=r"decodes by \['WordPiece'\].*byte-level BPE or SentencePiece"):
        word_pieces().token_bytes()


def test_decoding_agrees_with_the_stop_table(trained):
    stops = stop_table.build(trained[0].token_bytes(), STOP_TAGS)
    rng = random.Random(0)
    favourites = [i for i, piece in enumerate(trained[0].token_bytes()) if piece.strip(b"</searchnw>") == b""]
    stopped = 0
    for _ in range(2000):
        state = stops.start
        ids = rng.choices(favourites, k=rng.randint(1, 10))
        for i in ids:
            state = stops.table[state, i]
        assert (state == stops.stop) == any(tag in trained[0].decode(ids) for tag in STOP_TAGS)
        stopped += state == stops.stop
    assert 100 < stopped < 1900


def test_an_id_that_no_token_has_decodes_to_nothing(trained):
    assert trained[0].decode([*trained[0].encode("Ada"), VOCAB_SIZE, VOCAB_SIZE + 99]) == "Ada"


def test_a_qwen2_config_beside_the_tokenizer_changes_no_token(trained, tmp_path):
    trained[0].save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    beside = tokenizer.Tokenizer.load(tmp_path)
    assert beside.token_bytes() == trained[0].token_bytes()
    for text in nasty_texts(200):
        if "\u0301" not in text:  # Qwen2's tokenizer composes characters (NFC)
            assert beside.encode(text) == trained[0].encode(text)


@pytest.mark.parametrize(
    "generation, config, expected",
    [(None, None, {0}), ([7, 9], 9, {0, 7, 9}), (5, None, {0, 5}), (None, [3, 4], {0, 3, 4})],
)
def test_eos_ids_are_the_tokenizers_and_the_models(trained, tmp_path, generation, config, expected):
    trained[0].save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": config}))
    loaded = tokenizer.Tokenizer.load(tmp_path)
    assert loaded.eos_ids == expected
    loaded.save(tmp_path / "saved")
    assert tokenizer.Tokenizer.load(tmp_path / "saved").eos_ids == expected


def test_a_prompt_without_chat_template_begins_as_the_tokenizer_begins_texts(trained):
    text = "Who? <|endoftext|>"
    assert trained[0].encode_prompt(text) == trained[0].encode(text)
    begins = with_special_tokens(trained, template="<|bos|> $A")
    assert begins.encode_prompt(text) == [VOCAB_SIZE] + trained[0].encode(text)
    assert begins.encode(text) == trained[0].encode(text)


def test_a_prompt_never_ends_with_an_end_of_sequence(trained):
    ends = with_special_tokens(trained, template=f"<|bos|> $A {tokenizer.EOS}")
    assert ends.encode_prompt("Who?") == [VOCAB_SIZE] + trained[0].encode("Who?")


def test_a_chat_template_writes_every_special_token_itself(trained, tmp_path):
    template = (
        "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    chat = with_special_tokens(trained, template="<|bos|> $A", chat_template=template)
    expected = [VOCAB_SIZE] + trained[0].encode("user: Who?\nassistant:")
    assert chat.encode_prompt("Who?") == expected
    chat.save(tmp_path)
    assert tokenizer.Tokenizer.load(tmp_path).encode_prompt("Who?") == expected


CHAT = (  # the shape of Llama 3.x's and Qwen3's
    "{{ bos_token }}Today: {{ strftime_now('%d %b %Y') }}\n"
    "{% for message in messages %}{{ message.role }}: {{ message.content | trim }}<|bos|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %} no\n{% endif %}"
)


def test_a_prompt_does_not_change_with_the_calendar(trained):
    chat = with_special_tokens(trained, template="$A", chat_template=CHAT)
    of = lambda **keys: chat.decode(chat.encode_prompt("Who?", settings.Protocol(**keys)))
    assert of() == "<|bos|>Today: 26 Jul 2024\nuser: Who?<|bos|>assistant:"
    assert of(template_date="2026-01-02").startswith("<|bos|>Today: 02 Jan 2026\n")


def test_the_arguments_of_a_chat_template_are_the_configs(trained):
    chat = with_special_tokens(trained, template="$A", chat_template=CHAT)
    of = lambda **keys: chat.decode(chat.encode_prompt("Who?", settings.Protocol(**keys)))
    assert of(template_arguments=("enable_thinking=false",)).endswith("assistant: no\n")
    assert of(template_arguments=("enable_thinking=true",)).endswith("assistant:")
    assert "\nsystem: Be brief.<|bos|>user: Who?" in of(system="Be brief.")


def test_a_template_that_raises_is_a_wrong_input(trained):
    chat = with_special_tokens(trained, template="$A", chat_template="{{ raise_exception('no ' ~ messages[0].role) }}")
    with pytest.raises(ValueError, match="chat template fails: TemplateError: no system; look at protocol.system and"):
        chat.encode_prompt("Who?", settings.Protocol(system="Be brief."))


@pytest.mark.parametrize("text", ["<|bos|>", "who is <|endoftext|>?", "a<|bos|><|bos|>b", "<search> <|bos|>", "plain"])
def test_special_tokens_in_a_question_stay_text(trained, text):
    chat = with_special_tokens(trained, template="$A", chat_template=CHAT)
    ids = chat.encode_prompt(text)
    assert f"\nuser: {text}<|bos|>assistant:" in chat.decode(ids)
    assert ids.count(VOCAB_SIZE) == 2 and 0 not in ids  # those of the template alone


@pytest.mark.parametrize("given", ["enable_thinking", "=1", "messages=[]", "a b=1"])
def test_an_argument_of_a_template_has_a_name_and_a_value(given):
    with pytest.raises(ValueError, match="protocol.template_arguments holds .*; write name=value"):
        protocol.template_arguments(settings.Protocol(template_arguments=(given,)))


def test_framed_text_keeps_its_frame_when_it_is_cut():
    tok = word_pieces()
    assert tok.framing(6)(["who wrote emma"]) == [([1, 3, 4, 5, 6, 2], [0] * 6)]
    assert tok.framing(5)(["who wrote emma"]) == [([1, 3, 4, 5, 2], [0] * 5)]
    assert tok.encode("who wrote emma") == [3, 4, 5, 6]


def test_a_missing_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"no tokenizer at '{tmp_path}'.*tokenizer.json"):
        tokenizer.Tokenizer.load(tmp_path)
