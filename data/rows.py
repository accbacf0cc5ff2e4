"""Tables: one prompt for every row, a schema that the answers have to fit, rows to train on.

To enrich, summarise, extract from or restructure a table with a model is one map: a template with
{column} for the values of a row, a reply that is JSON, a JSON schema that says what it must look
like. What does not fit is no answer; it is kept with the reason.

    rows = read_rows("shop.csv")                                 # or .jsonl, one object a line
    results = map_rows(complete, rows, "What is {name}? Answer in JSON: ...", schema)

`complete(prompts, **sampling) -> texts` is any model: data/endpoint.py, or a function of yours.

Only the standard library is needed, so the file can be copied out alone. Of JSON Schema it knows
the rules in RULES, and `check_schema` refuses a schema with others rather than pass over them.

Run: `python data/rows.py` maps four rows with a function in place of a model, and prints

    apple      {'kind': 'fruit', 'price': 2}
    saw        {'kind': 'tool', 'price': 9.5}
    dog        rejected: $.kind is "pet", wanted one of ["fruit", "tool"]
    nail       rejected: $.price is missing
    ok: two of four answers fit the schema
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ANSWER_TOKENS = 512  # at most, of the answer for one row


def read_text(path: str | Path) -> str:
    """The text of a file. Raises: ValueError that names the file, if it is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8, at byte {error.start}") from error


def read_json(path: str | Path) -> object:
    """Raises: ValueError that names the file."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a .csv file with a header, or of a file with one JSON object a line.

    Raises: ValueError that names the line.
    """
    text = read_text(path)
    if str(path).endswith(".csv"):
        table = csv.DictReader(io.StringIO(text, newline=""), restkey="more", restval="")
        try:
            return list(table)
        except csv.Error as error:
            raise ValueError(f"{path}, after line {table.line_num}: no CSV: {error}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                rows.append(dict(json.loads(line).items()))
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no JSON object: {error}") from error
    return rows


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """One JSON object a line; at every instant the old file or the new one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    # a lone surrogate, which JSON can hold, is written as its escape
    with open(part, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


# 1. Schemas

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
         "number": (int, float), "integer": int}  # fmt: skip
RULES = {"type": (str, list), "required": list, "enum": list, "properties": dict,
         "items": (dict, bool), "minimum": (int, float), "maximum": (int, float),
         "additionalProperties": (dict, bool)}  # fmt: skip


def is_a(value: object, kind: str) -> bool:
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()  # JSON Schema: 1.0 is an integer
    return isinstance(value, TYPES[kind]) and (
        not isinstance(value, bool) or kind == "boolean"  # in Python a bool is an int
    )


def equal_json(a: object, b: object) -> bool:
    """1 is 1.0, but not true."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True) or (
        is_a(a, "number") and is_a(b, "number") and a == b
    )


def check_schema(schema: object, at: str = "schema") -> None:
    """Raises: ValueError for a schema that says what `schema_fault` would not look at."""
    if not isinstance(schema, dict):
        raise ValueError(f"{at}: wanted an object, got {schema!r}")
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    known = list(TYPES)
    if unknown := sorted(schema.keys() - RULES) or [k for k in kinds if k not in known]:
        raise ValueError(f"{at}: {unknown[0]!r} is not among {', '.join([*RULES, *TYPES])}")
    for name, rule in schema.items():
        if not isinstance(rule, RULES[name]):
            raise ValueError(f"{at}.{name}: {rule!r} is of a wrong type")
    if not all(isinstance(name, str) for name in schema.get("required", [])):
        raise ValueError(f"{at}.required: wanted names, got {schema['required']!r}")
    if schema.get("type") == []:
        raise ValueError(f"{at}.type: wanted at least one of {', '.join(TYPES)}")
    for name, part in schema.get("properties", {}).items():
        check_schema(part, f"{at}.{name}")
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            check_schema(schema[name], f"{at}.{name}")


def schema_fault(value: object, schema: dict, at: str = "$") -> str | None:
    """The first place where a value breaks a schema, and how; None for one that fits."""
    kinds = schema.get("type", list(TYPES))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not any(is_a(value, kind) for kind in kinds):
        return f"{at} is {json.dumps(value)[:40]}, wanted {' or '.join(kinds)}"
    if "enum" in schema and not any(equal_json(value, one) for one in schema["enum"]):
        return f"{at} is {json.dumps(value)[:40]}, wanted one of {json.dumps(schema['enum'])}"
    if is_a(value, "number"):
        if value < schema.get("minimum", -math.inf):
            return f"{at} is {value}, wanted at least {schema['minimum']}"
        if value > schema.get("maximum", math.inf):
            return f"{at} is {value}, wanted at most {schema['maximum']}"
    parts: list[tuple[str, object, object]] = []
    if isinstance(value, dict):
        if missing := [name for name in schema.get("required", []) if name not in value]:
            return f"{at}.{missing[0]} is missing"
        rules, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        parts = [(f"{at}.{k}", v, rules.get(k, others)) for k, v in value.items()]
    elif isinstance(value, list):
        parts = [(f"{at}[{i}]", v, schema.get("items", True)) for i, v in enumerate(value)]
    for place, part, rule in parts:
        if rule is False:
            return f"{place} is not asked for"
        if rule is not True and (fault := schema_fault(part, rule, place)):
            return fault
    return None


# 2. From a row to a prompt, and from a reply to an answer


def fill(template: str, row: dict) -> str:
    """The template with each {column} replaced by the row's value; braces around anything but a
    name, such as {"kind": 1} or {}, stay.

    Raises: ValueError for a {name} that the row does not have.
    """

    def value(match: re.Match) -> str:
        if match[1] not in row:
            raise ValueError(f"{{{match[1]}}} in the template is no column; wanted one of "
                             + ", ".join(map(str, row)))  # fmt: skip
        x = row[match[1]]
        return x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)

    names = "|".join(re.escape(str(name)) for name in row)  # whatever signs they have
    return re.sub(rf"\{{({names}|\w[\w .-]*)\}}", value, template)


def fill_all(template: str, rows: Sequence[dict]) -> list[str]:
    """The prompt of each row. Raises: ValueError that names the row."""
    prompts = []
    for number, row in enumerate(rows, 1):
        try:
            prompts.append(fill(template, row))
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
    return prompts


def finite(text: str) -> float:
    """Python reads NaN and 1e999, and writes them as what no other reader takes."""
    if not math.isfinite(x := float(text)):
        raise ValueError(f"{text} is no finite number")
    return x


def read_answer(reply: str, schema: dict) -> tuple[object, str | None]:
    """The JSON of a reply, also out of a fence between sentences, and its fault."""
    if getattr(reply, "refused", ""):
        return None, f"refused: {reply.refused}"
    if getattr(reply, "cut", False):
        return None, "cut off"
    fence = re.search(r"^\s*```\w*\s*\n(.*?)\n\s*```\s*$", reply, flags=re.DOTALL | re.MULTILINE)
    try:
        value = json.loads(fence[1] if fence else reply, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        return None, f"no JSON: {error}"
    return value, schema_fault(value, schema)


def map_rows(
    complete: Callable[..., Iterable[str]], rows: Sequence[dict], template: str, schema: dict
) -> list[dict]:
    """For each row {"row", "prompt", "answer", "reason"}: the reason is "" for an answer that fits;
    in place of one that does not stands the reply.

    Raises: ValueError before anything is asked, for a template or a schema that is not right.
    """
    check_schema(schema)
    prompts, results = fill_all(template, rows), []
    replies = list(complete(prompts, temperature=0.0, max_tokens=ANSWER_TOKENS))
    if len(replies) != len(rows):
        raise ValueError(f"{len(replies)} replies to {len(rows)} prompts")
    for row, prompt, reply in zip(rows, prompts, replies):
        answer, fault = read_answer(reply, schema)
        results.append({"row": row, "prompt": prompt, "answer": str(reply) if fault else answer,
                        "reason": fault or ""})  # fmt: skip
    return results


# 3. Tasks as rows: seeds, folds, texts to train on, and files as services read them


SEED = {"required": ["id", "instruction", "input", "output", "classification"],
        "properties": {"id": {"type": "string"}, "instruction": {"type": "string"},
                       "input": {"type": "string"}, "output": {"type": "string"},
                       "classification": {"type": "boolean"}}}  # fmt: skip


def load_seeds(path: str | Path) -> list[dict]:
    """Seed tasks: rows that fit SEED. Raises: ValueError that names the row."""
    seeds = read_rows(path)
    for number, task in enumerate(seeds, 1):
        if fault := schema_fault(task, SEED):
            raise ValueError(f"{path}, row {number}: {fault}")
    if len({task["id"] for task in seeds}) < len(seeds):
        raise ValueError(f"{path}: two tasks have the same id")
    if not seeds:
        raise ValueError(f"{path}: no tasks; wanted at least one, a JSON object a line")
    return seeds


def grouped_folds(ancestors: Sequence[str], k: int) -> list[int]:
    """The fold of each item; all that comes from one seed task is in one, so that no test item
    has a sibling in training. Largest group first into the smallest fold."""
    sizes, fold_of = [0] * k, {}
    counts = Counter(ancestors)
    for name, count in sorted(counts.items(), key=lambda x: (-x[1], x[0])):
        fold_of[name] = sizes.index(min(sizes))
        sizes[fold_of[name]] += count
    return [fold_of[name] for name in ancestors]


TEMPLATES = {  # a model trained on one form only would depend on it
    True: [
        "{instruction}\n\n{input}\n\n", "{instruction}\nInput: {input}\nOutput:",
        "Task: {instruction}\n{input}\nAnswer:", "{instruction}\n\nInput: {input}\n\nOutput:",
        "{instruction} {input}\n\n", "Do this.\n{instruction}\n\nWith this: {input}\n\nResult:",
        "{instruction}\n\n{input}\n\nAnswer:",
    ],
    False: [
        "{instruction}\n\n", "{instruction} Output:", "Task: {instruction}\nAnswer:",
        "{instruction}\n\nOutput:", "{instruction}\n", "Do this.\n{instruction}\n\nResult:",
    ],
}  # fmt: skip


def training_text(item: dict, seed: int = 0) -> tuple[str, str]:
    """Prompt and response of an item in one of the templates, drawn by the item's id: step 6."""
    templates = TEMPLATES[bool(item["input"])]
    template = random.Random(json.dumps((seed, item["id"]))).choice(templates)
    return template.format(instruction=item["instruction"], input=item["input"]), item["output"]


def alpaca_record(item: dict) -> dict:
    return {name: item[name] for name in ("instruction", "input", "output")}


def chat_record(item: dict) -> dict:
    request = item["instruction"] + ("\n\n" + item["input"] if item["input"] else "")
    return {"messages": [{"role": "user", "content": request},
                         {"role": "assistant", "content": item["output"]}]}  # fmt: skip


ROLES = ("system", "user", "assistant", "tool", "function", "developer")
MESSAGE_KEYS = {"role", "content", "name", "function_call", "tool_calls", "weight"}


def chat_fault(record: object) -> str | None:
    """The first of seven faults of a line of a chat file that a fine-tuning service would refuse.

    Source: OpenAI cookbook, Chat_finetuning_data_prep.
    """
    if not isinstance(record, dict):
        return "not an object"
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        return "no list of messages"
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return "a message without role or content"
        if extra := sorted(message.keys() - MESSAGE_KEYS):
            return f"unknown key {extra[0]}"
        if message["role"] not in ROLES:
            return f"unknown role {message['role']!r}"
        called = message.get("function_call") or message.get("tool_calls")
        if not (isinstance(message["content"], str) and message["content"]) and not called:
            return "content is no text"
    if not any(message["role"] == "assistant" for message in messages):
        return "no message of the assistant"
    return None


def count_tokens(record: dict, count: Callable[[str], int]) -> int:
    """Tokens of a chat record as billed for training: 3 a message, 1 a name, 3 for the reply."""
    total = 3
    for message in record["messages"]:
        texts = [v for v in message.values() if isinstance(v, str)]
        total += 3 + ("name" in message) + sum(map(count, texts))
    return total


def demo() -> None:
    schema = {
        "type": "object",
        "required": ["kind", "price"],
        "properties": {"kind": {"enum": ["fruit", "tool"]}, "price": {"minimum": 0}},
    }
    replies = {
        "apple": '{"kind": "fruit", "price": 2}',
        "saw": 'Here it is:\n```json\n{"kind": "tool", "price": 9.5}\n```',
        "dog": '{"kind": "pet", "price": 2}',
        "nail": '{"kind": "tool"}',
    }

    def model(prompts, **sampling):
        return [replies[re.search(r"What is (\w+)", prompt)[1]] for prompt in prompts]

    results = map_rows(model, [{"name": name} for name in replies], "What is {name}?", schema)
    for result in results:
        fault = result["reason"]
        print(f"{result['row']['name']:11}{f'rejected: {fault}' if fault else result['answer']}")
    if [not result["reason"] for result in results] != [True, True, False, False]:
        raise SystemExit("FAILED: wanted the first two answers, and no other")
    print("ok: two of four answers fit the schema")


if __name__ == "__main__":
    demo()
