"""Bad rows, files, sources and chat templates."""

import gzip
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from bench import Case

ROW = {"prompt": "What is two and two?", "chosen": "Four, of course.", "rejected": "Five."}
CHAT = {
    "prompt": [{"role": "user", "content": "What is two and two?"}],
    "chosen": [{"role": "assistant", "content": "Four, of course."}],
    "rejected": [{"role": "assistant", "content": "Five."}],
}


def written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def line(row: object) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def chat_rows(folder: Path) -> None:
    (folder / "pairs.jsonl").write_bytes(line(CHAT))


def good_rows(folder: Path) -> None:
    (folder / "pairs.jsonl").write_bytes(line(ROW) + line(CHAT))


def read_from(path: str, **fields: object) -> tuple[str, ...]:
    return (f"data.train.0.path={path}", *(f"data.train.0.{key}={value}" for key, value in fields.items()))


def parquet(folder: Path, columns: Mapping[str, Sequence[object]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def cut_parquet(folder: Path) -> None:
    file = parquet(folder, {name: [text] * 50 for name, text in ROW.items()})
    file.write_bytes(file.read_bytes()[:300])


def flipped_parquet(folder: Path) -> None:
    import random

    text = random.Random(0).choices("abcdefgh ", k=4000)
    file = parquet(folder, {name: ["".join(text)] * 5 + [name] for name in ROW})
    content = bytearray(file.read_bytes())
    content[4:60] = bytes(56)
    file.write_bytes(content)


def saved(folder: Path) -> Path:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list([ROW])}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def damaged_dataset(folder: Path) -> None:
    (saved(folder) / "train" / "state.json").write_text("{")


def dataset_without_its_rows(folder: Path) -> None:
    for file in (saved(folder) / "train").glob("*.arrow"):
        file.unlink()


def dataset_with_cut_rows(folder: Path) -> None:
    for file in (saved(folder) / "train").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])


def flipped_gzip(folder: Path) -> None:
    content = bytearray(gzip.compress(line(ROW) * 50, mtime=0))
    content[-6] ^= 0xFF
    (folder / "pairs.jsonl.gz").write_bytes(content)


def unreadable(folder: Path) -> None:
    (folder / "pairs.jsonl").chmod(0)


def model(folder: Path, **tokenizer_config: object) -> None:
    """A copy of the model whose tokenizer_config.json says something else."""
    shutil.copytree(folder / "llama", folder / "other")
    file = folder / "other" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **tokenizer_config}))


def without_template(folder: Path) -> None:
    model(folder)
    (folder / "other" / "chat_template.jinja").unlink()


def templates_without_default(folder: Path) -> None:
    without_template(folder)
    extra = folder / "other" / "additional_chat_templates"
    extra.mkdir()
    (extra / "rag.jinja").write_text("{{ messages }}")
    chat_rows(folder)


ROWS = [
    Case("data/line_cut_short", ("pairs.jsonl:2 is not JSON", "Invalid control character", "near "), mended=good_rows),
    Case("data/array_named_jsonl", ("pairs.jsonl:1 holds an array", "name it .json")),
    Case("data/row_is_a_string", ("pairs.jsonl:2 holds a string", "expected an object", "format: text")),
    Case("data/row_is_a_list", ("pairs.jsonl:2 holds an array", "expected an object")),
    Case("data/row_is_null", ("pairs.jsonl:2 holds null", "expected an object")),
    Case("data/columns_unknown", ("pairs.jsonl:1 has the columns bad, good, question", "Expected pairs: chosen, ")),
    Case("data/column_missing_later", ("pairs.jsonl:3 has the columns chosen, prompt", "pairs: chosen, prompt, rej")),
    Case("data/column_null_later", ("pairs.jsonl:2 has the columns", "(null: rejected)")),
    Case("data/prompt_is_a_number", ("pairs.jsonl:2: column prompt is 3, expected a string or a list of messages",)),
    Case("data/answer_is_an_empty_list", ("pairs.jsonl:1: column chosen is list []", "a list of messages")),
    Case("data/role_unknown", ("pairs.jsonl:2: prompt[1].role is 'robot'", "expected one of assistant, ")),
    Case("data/role_is_a_list", ("pairs.jsonl:1: prompt[0].role is list ['user']", "expected one of assistant, ")),
    Case("data/message_without_content", ("pairs.jsonl:1: chosen[0].content is None", "expected a string")),
    Case("data/message_is_a_string", ("pairs.jsonl:1: prompt[0] is 'Two and two?'", "role and content")),
    Case("data/message_with_an_image", ("pairs.jsonl:1: prompt[0].content holds parts that are not text",)),
    Case("data/score_is_text", ("pairs.jsonl:2: column chosen_score is 'high', expected a number",)),
    Case("data/score_is_nan", ("pairs.jsonl:1: column chosen_score is nan, expected a number",)),
    Case("data/one_score_of_two", ("pairs.jsonl:1 has chosen_score but not both",)),
    Case("data/preference_is_text", ("pairs.jsonl:1: column overall_preference is 'first', expected a number",)),
    Case("data/every_row_dropped", ("every row is dropped (equal_answers: 2, empty_prompt: 1)", "pairs.jsonl:1")),
    Case("data/blank_lines_only", ("pairs.jsonl holds no rows, expected at least one",)),
    Case("data/binary_feedback", ("pairs.jsonl:1 is of format labels", "binary feedback", "kto, bco or apo_zero_unp")),
    Case("data/one_answer_for_dpo", ("pairs.jsonl:1 is of format completions", "compares 2 answers", "name sft")),
    Case(
        "data/format_ambiguous",
        ("can be read as conversations or messages", "data.*.format"),
        ("objective={name: sft}",),
    ),
    Case("data/answers_of_two_kinds", ("pairs.jsonl:1: column rejected is", "same kind as column chosen")),
    Case("data/half_a_surrogate_pair", ("pairs.jsonl:2: chosen holds half of a surrogate pair at character 5",)),
    Case("data/history_is_a_number", ("pairs.jsonl:1: column history is 3, expected a list of",)),
    Case("data/history_is_half_a_pair", ("pairs.jsonl:1: column history", "[question, answer] at index 0")),
    Case("data/tools_not_json", ("pairs.jsonl:1: column tools is '[{calculator', expected a JSON array",)),
    Case("data/template_kwargs_reserved", ("pairs.jsonl:2: column chat_template_kwargs", "add_generation_prompt")),
    Case("data/template_kwargs_a_list", ("pairs.jsonl:1: column chat_template_kwargs is list", "expected an object")),
    Case("data/mistake_after_crlf", ("pairs.jsonl:3 is not JSON",)),
    Case("data/byte_order_mark_within", ("pairs.jsonl:2 is not JSON", "column 1")),
    Case("data/json_object_with_garbage", ("pairs.json:1 is not JSON: Extra data",), read_from("pairs.json")),
    Case("data/transcripts_share_nothing", ("pairs.jsonl: every row is dropped (empty_prompt: 1)", "pairs.jsonl:1")),
    Case("nothing at all", ("pairs.jsonl holds no rows",), change=written("pairs.jsonl", b"")),
    Case(
        "evaluation data empty",
        ("eval.jsonl holds no rows",),
        change=written("eval.jsonl", b""),
    ),
    Case(
        "every evaluation row dropped",
        ("eval.jsonl: every row is dropped (equal_answers: 1)", "eval.jsonl:1"),
        change=written("eval.jsonl", line({**ROW, "rejected": ROW["chosen"]})),
    ),
    Case(
        "nested too deeply",
        ("pairs.jsonl:2", "cannot be read"),
        change=written("pairs.jsonl", line(ROW) + b"[" * 100_000 + b"\n"),
    ),
    Case(
        "a huge line, cut",
        ("pairs.jsonl:2 is not JSON: Unterminated string",),
        change=written("pairs.jsonl", line(ROW) + line({"prompt": "x" * 4_000_000})[:-10]),
    ),
    Case(
        "a number of 5000 digits",
        ("pairs.jsonl:1", "cannot be read"),
        change=written("pairs.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n"),
    ),
    Case(
        "surrogate in a column of no concern, row dropped",
        ("pairs.jsonl: every row is dropped (equal_answers: 1)",),
        change=written("pairs.jsonl", json.dumps({**ROW, "rejected": ROW["chosen"], "id": "\ud83d"}).encode()),
    ),
]

ANSWER = {"prompt": "What is two and two?", "completion": "Four, of course.", "label": True}
BAD_ANSWER = {"prompt": "And three and three?", "completion": "Seven.", "label": False}
LIST = {"prompt": "What is two and two?", "completions": ["Four, of course.", "Four or five.", "Five."]}
LABELLED_LIST = {**LIST, "labels": [True, False, False]}


def rows(*listed: object) -> Callable[[Path], object]:
    return written("pairs.jsonl", b"".join(map(line, listed)))


def for_kto(name: str, tells: tuple[str, ...], *listed: object) -> Case:
    return Case(name, tells, ("objective={name: kto}",), rows(*listed))


def for_ranking(name: str, tells: tuple[str, ...], *listed: object) -> Case:
    return Case(name, tells, ("objective={name: plackett_luce, max_completions: 3}",), rows(*listed))


JUDGEMENTS = [
    for_kto(
        "label as text",
        ("pairs.jsonl:2: column label is 'True', expected true or false, 1 or 0, or a probability between them",),
        ANSWER,
        {**BAD_ANSWER, "label": "True"},
    ),
    for_kto("label of 1.5", ("pairs.jsonl:1: column label is 1.5, expected true or",), {**ANSWER, "label": 1.5}),
    for_kto("label is a list", ("pairs.jsonl:1: column label is list [True]",), {**ANSWER, "label": [True]}),
    for_kto("label NaN", ("pairs.jsonl:1: column label is nan",), {**ANSWER, "label": float("nan")}),
    for_kto(
        "label missing in a later row",
        ("pairs.jsonl:2 has the columns completion, prompt", "Expected labels: completion, prompt, label or kto_tag"),
        ANSWER,
        {"prompt": "And three and three?", "completion": "Seven."},
    ),
    for_kto(
        "label null in a later row",
        ("pairs.jsonl:2 has the columns completion, prompt (null: label)", "label or kto_tag"),
        ANSWER,
        {**BAD_ANSWER, "label": None},
    ),
    for_kto(
        "two labels",
        ("pairs.jsonl:1 has two columns that say if the answer is desirable, kto_tag and label. Expected one",),
        {**ANSWER, "kto_tag": True},
    ),
    for_kto(
        "answers without a label",
        ("pairs.jsonl:1 is of format completions", "whether an answer is desirable", "Expected a column label"),
        {"prompt": "Two and two?", "completion": "Four."},
    ),
    for_kto(
        "answer given twice",
        ("pairs.jsonl:1 holds its answer twice, in the columns completion, prompt and in messages",),
        {**ANSWER, "messages": [*CHAT["prompt"], *CHAT["chosen"]]},
    ),
    for_kto(
        "labels and pairs",
        ("pairs.jsonl:1 can be read as labels or pairs", "data.*.format"),
        {**ROW, **ANSWER},
    ),
    for_kto(
        "labels of another length",
        ("pairs.jsonl:2: column labels has 2 entries and column completions 3",),
        LABELLED_LIST,
        {**LABELLED_LIST, "labels": [True, False]},
    ),
    for_kto(
        "labels not a list",
        ("pairs.jsonl:1: column labels is True, expected a list of labels",),
        {**LABELLED_LIST, "labels": True},
    ),
    for_kto(
        "one of the labels as text",
        ("pairs.jsonl:1: column labels[2] is 'bad', expected true or false",),
        {**LABELLED_LIST, "labels": [True, False, "bad"]},
    ),
    for_kto(
        "labelled answers not a list",
        ("pairs.jsonl:1: column completions is 'Four.', expected a list of answers",),
        {**LABELLED_LIST, "completions": "Four."},
    ),
    for_kto(
        "rankings for an objective of labels",
        ("pairs.jsonl:1 is of format rankings", "all_pairs, plackett_luce or reward"),
        LIST,
    ),
    Case(
        "one prompt in all rows",
        ("pairs.jsonl: 3 of 3 examples have the prompt of pairs.jsonl:1 (answer 1)", "at least two different prompts"),
        ("objective={name: kto}",),
        rows(LABELLED_LIST),
        mended=rows(LABELLED_LIST, {**LABELLED_LIST, "prompt": "How much is two and two?"}),
    ),
    Case(
        "one prompt in most rows",
        ("pairs.jsonl: 3 of 4 examples have the prompt of", "none in more than half of the examples"),
        ("objective={name: kto}",),
        rows(LABELLED_LIST, {"prompt": BAD_ANSWER["prompt"], "completions": ["Six."], "labels": [True]}),
    ),
    Case(
        "a single pair for kto",
        ("pairs.jsonl: 2 of 2 examples have the prompt of pairs.jsonl:1 (chosen)",),
        ("objective={name: kto}",),
        rows(ROW),
        mended=rows(ROW, CHAT),
    ),
    for_ranking(
        "completions not a list",
        ("pairs.jsonl:2: column completions is 'Four.', expected a list of answers",),
        LIST,
        {**LIST, "completions": "Four."},
    ),
    for_ranking(
        "one completion",
        ("every row is dropped (too_few_answers: 1)", "pairs.jsonl:1"),
        {**LIST, "completions": ["Four."]},
    ),
    Case(
        "more completions than the objective takes",
        ("every row is dropped (over_max_completions: 1)", "pairs.jsonl:1"),
        ("objective={name: plackett_luce, max_completions: 2}",),
        rows(LIST),
        mended=("objective={name: plackett_luce, max_completions: 3}",),
    ),
    for_ranking(
        "scores that are equal",
        ("every row is dropped (tie: 1)", "pairs.jsonl:1"),
        {**LIST, "scores": [2, 1, 1]},
    ),
    for_ranking(
        "scores of another length",
        ("pairs.jsonl:1: column scores has 2 entries and column completions 3",),
        {**LIST, "scores": [2, 1]},
    ),
    for_ranking(
        "one of the scores NaN",
        ("pairs.jsonl:1: column scores[1] is nan, expected a number",),
        {**LIST, "scores": [2, float("nan"), 1]},
    ),
    for_ranking(
        "scores null in a later row",
        ("pairs.jsonl:2 has null in its column scores", "Expected scores in every row, or in none"),
        {**LIST, "scores": [2, 3, 1]},
        {**LIST, "scores": None},
    ),
    for_ranking(
        "scores in a later row alone",
        ("pairs.jsonl:2 has a column scores", "Expected scores in every row, or in none"),
        LIST,
        {**LIST, "scores": [2, 3, 1]},
    ),
    Case(
        "scores null in a row of a parquet file",
        ("pairs.parquet:row 2 has null in its column scores", "Expected scores in every row, or in none"),
        ("objective={name: plackett_luce, max_completions: 3}", *read_from("pairs.parquet")),
        lambda folder: parquet(
            folder, {**{name: [value] * 2 for name, value in LIST.items()}, "scores": [[2, 3, 1], None]}
        ),
    ),
    for_ranking(
        "a pair's probability beside a list",
        ("pairs.jsonl:2 has a column chosen_probability", "Expected rows without it, or data.*.format: rankings"),
        LIST,
        {**LIST, "chosen_probability": 0.9},
    ),
    for_kto(
        "scores beside labels",
        ("pairs.jsonl:1 has a column scores", "belongs to rows such as rankings: completions, prompt"),
        {**LABELLED_LIST, "scores": [2, 3, 1]},
    ),
    for_ranking(
        "an answer in the list that is a number",
        ("pairs.jsonl:1: column completions[1] is 4, expected a string or a list of messages",),
        {**LIST, "completions": ["Four.", 4]},
    ),
    for_ranking(
        "labels for an objective of rankings",
        ("pairs.jsonl:1 is of format labels", "kto, bco or apo_zero_unpaired"),
        LABELLED_LIST,
    ),
    for_ranking(
        "rankings and pairs",
        ("pairs.jsonl:1 can be read as pairs or rankings", "data.*.format"),
        {**ROW, **LIST},
    ),
    Case(
        "rankings for dpo",
        ("pairs.jsonl:1 is of format rankings", "all_pairs, plackett_luce or reward", "Expected one of these"),
        change=rows(LIST),
        mended=("objective={name: all_pairs, max_completions: 3, pair: {name: dpo}}",),
    ),
    Case(
        "probability above 1",
        ("pairs.jsonl:2: column chosen_probability is 1.2, expected a probability, from 0 to 1",),
        change=rows(ROW, {**ROW, "chosen_probability": 1.2}),
    ),
    Case(
        "probability in percent, as text",
        ("pairs.jsonl:1: column chosen_probability is '80%', expected a probability",),
        change=rows({**ROW, "chosen_probability": "80%"}),
    ),
    Case(
        "margin and scores",
        ("pairs.jsonl:1 says more than once how far apart", "chosen_score/rejected_score and in margin"),
        change=rows({**ROW, "margin": 1, "chosen_score": 2, "rejected_score": 1}),
    ),
    Case(
        "margin as text",
        ("pairs.jsonl:1: column margin is 'large', expected a number",),
        change=rows({**ROW, "margin": "large"}),
    ),
    Case(
        "margin of which the loss is infinite",
        ("pairs.jsonl:1: column margin is 1e+38, expected a number from -1,000,000 to 1,000,000",),
        change=rows({**ROW, "margin": 1e38}),
    ),
    Case(
        "scores of which the gap is infinite",
        ("pairs.jsonl:2: column chosen_score is 3.4e+38, expected a number from -1,000,000 to 1,000,000",),
        ("objective={name: reward}",),
        rows(ROW, {**ROW, "chosen_score": 3.4e38, "rejected_score": -3.4e38}),
    ),
    Case(
        "score of 400 digits",
        ("pairs.jsonl:1: column chosen_score is 9999", "expected a number from"),
        change=rows({**ROW, "chosen_score": int("9" * 400), "rejected_score": 1}),
    ),
]

FILES = [
    Case(
        "UTF-16",
        ("pairs.jsonl:1 begins as UTF-16, expected UTF-8",),
        change=written("pairs.jsonl", line(ROW).decode().encode("utf-16")),
    ),
    Case(
        "Latin-1",
        ("pairs.jsonl:2 is not UTF-8: byte 0xe9 in byte column 18",),
        change=written("pairs.jsonl", line(ROW) + '{"prompt": "Le thé?"'.encode("latin-1")),
    ),
    Case("NUL bytes", ("pairs.jsonl:2 is not JSON",), change=written("pairs.jsonl", line(ROW) + bytes(64))),
    Case(
        "gz that is none",
        ("pairs.jsonl.gz is not a whole gzip file: Not a gzipped file",),
        read_from("pairs.jsonl.gz"),
        written("pairs.jsonl.gz", line(ROW)),
    ),
    Case(
        "gz cut",
        ("pairs.jsonl.gz is not a whole gzip file", "cut short or damaged"),
        read_from("pairs.jsonl.gz"),
        written("pairs.jsonl.gz", gzip.compress(line(ROW) * 50)[:-20]),
    ),
    Case(
        "gz with a flipped byte",
        ("pairs.jsonl.gz is not a whole gzip file: CRC",),
        read_from("pairs.jsonl.gz"),
        flipped_gzip,
    ),
    Case(
        "parquet that is none",
        ("pairs.parquet is not a whole parquet file",),
        read_from("pairs.parquet"),
        written("pairs.parquet", b"no parquet at all"),
    ),
    Case("parquet cut", ("pairs.parquet is not a whole parquet file",), read_from("pairs.parquet"), cut_parquet),
    Case(
        "parquet with zeroed bytes",
        ("pairs.parquet is not a whole parquet file",),
        read_from("pairs.parquet"),
        flipped_parquet,
    ),
    Case(
        "parquet of numbers",
        ("pairs.parquet:row 1: column prompt is 1, expected a string or a list of messages",),
        read_from("pairs.parquet"),
        lambda folder: parquet(folder, {name: [1] for name in ROW}),
    ),
    Case(
        "no such file",
        ("piars.jsonl (data.*.path) does not exist", "Did you mean pairs.jsonl?"),
        read_from("piars.jsonl"),
        mended=read_from("pairs.jsonl"),
    ),
    Case(
        "no such evaluation file",
        ("evil.jsonl (data.*.path) does not exist", "Did you mean eval.jsonl?"),
        ("data.eval.0.path=evil.jsonl",),
    ),
    Case(
        "no such folder",
        ("no/pairs.jsonl (data.*.path) does not exist", "no folder no"),
        read_from("no/pairs.jsonl"),
    ),
    Case("a name too long for a file", ("data.train.0.path",), read_from("x" * 300 + ".jsonl")),
    Case("home of nobody", ("~nobody-here/pairs.jsonl", "data.train.0.path"), read_from("~nobody-here/pairs.jsonl")),
    Case("a path with a NUL", ("data.train.0.path",), ('data.train.0.path="pairs\\0.jsonl"',)),
    Case(
        "a suffix jaxpo does not read",
        ("pairs.xlsx (data.*.path) is no file that jaxpo reads", ".jsonl, .json"),
        read_from("pairs.xlsx"),
        written("pairs.xlsx", b"PK"),
    ),
    Case(
        "a folder in place of the file",
        ("pairs.jsonl (data.*.path) is no folder of data",),
        change=lambda f: ((f / "pairs.jsonl").unlink(), (f / "pairs.jsonl").mkdir()),
    ),
    Case(
        "a folder of nothing to read",
        ("notes (data.*.path) is no folder of data",),
        read_from("notes"),
        lambda f: ((f / "notes").mkdir(), (f / "notes/todo.docx").write_text("buy milk")),
    ),
    Case(
        "a link to nowhere",
        ("pairs.jsonl (data.*.path) does not exist",),
        change=lambda f: ((f / "pairs.jsonl").unlink(), (f / "pairs.jsonl").symlink_to("gone.jsonl")),
    ),
    Case(
        "split of a file",
        ("pairs.jsonl has no split 'test'", "expected one of train"),
        read_from("pairs.jsonl", split="test"),
    ),
    Case(
        "configuration of a file",
        ("data.*.name is 'default'", "only a dataset of the hub"),
        read_from("pairs.jsonl", name="default"),
    ),
    Case(
        "revision of a folder",
        ("data.*.revision is 'main'", "only a dataset of the hub"),
        read_from("rows", revision="main"),
        lambda f: ((f / "rows").mkdir(), (f / "rows/train.jsonl").write_bytes(line(ROW))),
    ),
    Case(
        "format of other columns",
        ("pairs.jsonl:1 has the columns chosen, prompt, rejected", "data.*.format: helpsteer3"),
        read_from("pairs.jsonl", format="helpsteer3"),
    ),
    Case("world unknown", ("jaxpo:costumer-service", "customer-service"), read_from("jaxpo:costumer-service")),
    Case(
        "split of a world unknown",
        ("jaxpo:customer-service", "no split validation", "sft-train"),
        read_from("jaxpo:customer-service", split="validation"),
    ),
    Case("hub id without a network", ("org/pairs (data.*.path)", "hf download"), read_from("org/pairs")),
    Case(
        "saved dataset with a broken state",
        ("saved is not a whole saved dataset",),
        read_from("saved"),
        damaged_dataset,
    ),
    Case(
        "saved dataset without its rows",
        ("saved is not a whole saved dataset",),
        read_from("saved"),
        dataset_without_its_rows,
    ),
    Case(
        "saved dataset with cut rows",
        ("saved is not a whole saved dataset",),
        read_from("saved"),
        dataset_with_cut_rows,
    ),
    Case(
        "split of a saved dataset",
        ("saved has no split 'test'", "expected one of train"),
        read_from("saved", split="test"),
        saved,
    ),
]

TEMPLATES = [
    Case(
        "data/template_syntax_error",
        ("data.chat_template", "no valid Jinja: line 1", "unexpected '}'"),
        ("data.chat_template=template.jinja",),
    ),
    Case(
        "data/template_raises",
        ("every row is dropped (template_refused: 1)", "only one turn, please"),
        ("data.chat_template=template.jinja",),
    ),
    Case(
        "data/template_divides_by_zero",
        ("pairs.jsonl:1: the chat template fails on this row", "division"),
        ("data.chat_template=template.jinja",),
    ),
    Case(
        "data/template_calls_what_is_not_there",
        ("pairs.jsonl:1: the chat template fails", "'speaker_of' is undefined"),
        ("data.chat_template=template.jinja",),
    ),
    Case("data/template_writes_nothing", ("every row is dropped",), ("data.chat_template=template.jinja",)),
    Case(
        "data/template_not_text",
        ("data.chat_template: template.jinja cannot be read as text",),
        ("data.chat_template=template.jinja",),
    ),
    Case(
        "template unknown",
        ("data.chat_template is 'chatmll'", "Did you mean chatml?"),
        ("data.chat_template=chatmll",),
    ),
    Case("template of a name too long", ("data.chat_template",), ("data.chat_template=" + "x" * 300,)),
    Case(
        "messages without a template",
        ("pairs.jsonl:1 holds messages", "no chat template", "data.chat_template", "chatml"),
        ("model.path=other",),
        without_template,
    ),
    Case(
        "several templates, none the default",
        ("several chat templates (rag)", "data.chat_template"),
        ("model.path=other",),
        templates_without_default,
    ),
    Case(
        "plain text without an end token",
        ("The tokenizer has no EOS token", "eos_token", "tokenizer_config.json"),
        ("model.path=other",),
        lambda folder: (model(folder, eos_token=None), (folder / "pairs.jsonl").write_bytes(line(ROW))),
    ),
    Case("max_length that holds no example", ("every row is dropped (no_completion_left: 8)",), ("data.max_length=1",)),
    Case(
        "rows that all of the data could not fill",
        ("training.row_length is 1000000000 and training.rows_per_device 1", "tokens in all", "at most 1048576"),
        ("training.row_length=1000000000",),
        mended=("training.row_length=256",),
    ),
    Case(
        "more rows at once than all of the data could fill",
        ("training.rows_per_device 1000000000000", "tokens in all", "at most 1048576"),
        ("training.rows_per_device=1000000000000",),
        mended=("training.rows_per_device=2",),
    ),
    Case(
        "row_length that holds no example",
        ("training.row_length is 16", "pairs.jsonl:", "Expected a row_length of at least"),
        ("training.row_length=16",),
        mended=("training.row_length=256",),
    ),
]

CASES = ROWS + JUDGEMENTS + FILES + TEMPLATES


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_data(case: Case, refused: Callable[[Case], None]):
    refused(case)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
def test_a_file_that_may_not_be_read(refused: Callable[[Case], None]):
    refused(Case("unreadable", ("pairs.jsonl cannot be read: Permission denied",), change=unreadable))
