"""What the scripts of the programs share: the request, greedy text by transformers' own generate, and the answer's last line."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def request() -> dict[str, Any]:
    """What to load and to ask; see `_asked` of the program that starts these scripts."""
    found: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return found


def run(code: str) -> tuple[dict[str, Any], float]:
    """What Python code of a card defines, and the seconds that it took."""
    names: dict[str, Any] = {}
    start = time.perf_counter()
    exec(code, names)
    return names, time.perf_counter() - start


def answer(version: str, seconds: float, answers: Any) -> None:
    """Print the answer as the last line."""
    print("\n" + json.dumps({"version": version, "seconds": seconds, "answers": answers}))


def continued(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """The greedy continuation of a prompt, by the model's own `generate`."""
    given = tokenizer(prompt, return_tensors="pt")
    made = model.generate(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"], do_sample=False, max_new_tokens=tokens
    )
    return str(tokenizer.decode(made[0, given["input_ids"].shape[1] :]))


def probabilities(model: Any, given: Any) -> list[dict[str, float]]:
    """For each text the probability of each label."""
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    rows = model(**given).logits.softmax(1).tolist()
    return [dict(zip(names, row, strict=True)) for row in rows]


def by_transformers(asked: dict[str, Any], model: Any) -> list[Any]:
    """The answers of a model that has the interface of transformers."""
    import torch
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(asked["folder"])
    except ValueError:  # transformers 4 does not know the class that transformers 5 names in a base's tokenizer
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{asked['folder']}/tokenizer.json")
    with torch.no_grad():
        if asked["kind"] == "texts":
            return [continued(model, tokenizer, prompt, asked["new_tokens"]) for prompt in asked["prompts"]]
        given = tokenizer(asked["texts"], padding=True, return_tensors="pt")
        if asked["kind"] != "embeddings":
            return probabilities(model, given)
        states, mask = model(**given).last_hidden_state, given["attention_mask"].unsqueeze(-1)
        mean = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=1).tolist()  # type: ignore[no-any-return]


def by_session(asked: dict[str, Any], run_graph: Any) -> list[Any]:
    """The answers of a graph: `run_graph` takes {name: array} and gives {name: array}. No cache: a prompt is read whole each time."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{asked['folder']}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if asked["kind"] == "texts":
        config = json.loads(Path(asked["folder"], "config.json").read_text())
        shape = (1, config["num_key_value_heads"], 0, config["hidden_size"] // config["num_attention_heads"])
        past = {
            f"past_key_values.{i}.{part}": np.zeros(shape, np.float32)
            for i in range(config["num_hidden_layers"])
            for part in ("key", "value")
        }
        found = []
        for prompt in asked["prompts"]:
            ids = tokenizer.encode(prompt).ids
            first = len(ids)
            while len(ids) < first + asked["new_tokens"] and (len(ids) == first or ids[-1] != config["eos_token_id"]):
                row = np.array([ids])
                given = {
                    "input_ids": row,
                    "attention_mask": np.ones_like(row),
                    "position_ids": np.arange(len(ids))[None],
                }
                ids.append(int(run_graph({**given, **past})["logits"][0, -1].argmax()))
            found.append(tokenizer.decode(ids[first:], skip_special_tokens=False))
        return found
    rows = []
    for text in asked["texts"]:
        encoded = tokenizer.encode(text)
        given = {
            "input_ids": np.array([encoded.ids]),
            "attention_mask": np.array([encoded.attention_mask]),
            "token_type_ids": np.array([encoded.type_ids]),
        }
        outputs = run_graph(given)
        if asked["kind"] == "embeddings":
            rows.append(outputs["sentence_embedding"][0].tolist())
            continue
        logits = outputs["logits"][0].astype(np.float64)
        names = json.loads(Path(asked["folder"], "config.json").read_text())["id2label"]
        shares = np.exp(logits - logits.max())
        rows.append({names[str(i)]: share for i, share in enumerate((shares / shares.sum()).tolist())})
    return rows
