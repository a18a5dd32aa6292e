"""What is in an explorer page, read and computed in Python as its script does it."""

import base64
import json
import re
from typing import Any

import numpy as np


def read_page(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


class PageLayer:
    """The matrices of one layer of a page, dense, each ``(heads, queries, keys)``."""

    def __init__(self, page: dict[str, Any], index: int) -> None:
        layer = page["layers"][index]
        self.data, self.page = layer, page

        def rows(name: str, heads: int) -> np.ndarray:
            return self._array(layer[name]).reshape(heads, -1, page["arrays"][layer[name]]["columns"])

        scores = plain = rows("query", layer["heads"]) @ rows("key", layer["heads"]).transpose(0, 2, 1)
        self.mask: np.ndarray | None = None
        if layer["op"] is None:
            plain = rows("plainQuery", layer["heads"]) @ rows("plainKey", layer["heads"]).transpose(0, 2, 1)
        else:
            self.mask = rows("left", layer["maskHeads"]) @ rows("right", layer["maskHeads"]).transpose(0, 2, 1)
        bias = 0.0
        if layer["bias"] is not None:
            bias = self._array(layer["bias"]["array"]).reshape(layer["bias"]["heads"], layer["bias"]["queries"], -1)
        modulated = scores
        if self.mask is not None:
            modulated = scores * self.mask if layer["op"] == "mul" else scores + self.mask
        self.masked, self.plain = softmax(modulated + bias), softmax(plain + bias)

    def _array(self, index: int) -> np.ndarray:
        stored = self.page["arrays"][index]
        values = np.frombuffer(base64.b64decode(stored["values"]), "<i2").reshape(-1, stored["columns"])
        scales = np.frombuffer(base64.b64decode(stored["scales"]), "<f4").astype(np.float64)
        return np.where(values == -32768, -np.inf, values * scales[:, None])


def softmax(scores: np.ndarray) -> np.ndarray:
    most = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isinf(most), 0, most))
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
