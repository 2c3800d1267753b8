"""Documents and questions about them: tau2-bank and cmrc2018."""

from __future__ import annotations

import gzip
import json

from millis.data.readers.labelled import Members, Rows


def tau2_bank(members: Members) -> Rows:
    (data,) = members.values()
    for row in json.loads(gzip.decompress(data)):
        yield "all", {"id": row["id"], "title": row["title"], "text": row["content"]}


def cmrc2018(members: Members) -> Rows:
    """SQuAD's form, flattened: a row is a question. `answers`: text and answer_start, in characters of the context."""
    (data,) = members.values()
    for article in json.loads(data)["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                row = {"id": question["id"], "title": article.get("title", ""), "context": paragraph["context"]}
                yield "all", {**row, "question": question["question"], "answers": question["answers"]}
