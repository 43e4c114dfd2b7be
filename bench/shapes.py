"""Sizes that real models have. The first field names the model or the batch, the rest are the shape."""

from typing import NamedTuple


class Head(NamedTuple):
    model: str
    N: int  # rows, already compacted: none is masked
    D: int
    V: int


class Logits(NamedTuple):
    model: str
    N: int
    V: int


class Responses(NamedTuple):
    model: str
    S: int  # responses
    T: int  # tokens of each, of which the first half is the prompt
    D: int
    V: int


class Packed(NamedTuple):
    batch: str
    S: int
    N: int


class Pairs(NamedTuple):
    batch: str
    P: int


class Rows(NamedTuple):
    batch: str
    N: int
    D: int


HEAD = {
    "small": (Head("small", 96, 64, 3001),),
    "default": (Head("SmolLM2-135M", 2048, 576, 49152),),
    "full": (Head("SmolLM2-135M", 2048, 576, 49152), Head("Llama-3.2-1B", 1024, 2048, 128256)),
    # for a GPU: a step of 8192 tokens, then a long one
    "models": (
        Head("SmolLM2-135M", 8192, 576, 49152),
        Head("Llama-3-8B", 8192, 4096, 128256),
        Head("Qwen2.5-7B", 8192, 3584, 151936),
        Head("Gemma-2-2B", 8192, 2304, 256000),
        Head("Llama-3-8B, long", 32768, 4096, 128256),
    ),
    # how time and memory grow with the rows and with the vocabulary; the larger ones are for a GPU
    "sweep": (
        *(Head(f"rows {n}", n, 576, 49152) for n in (128, 256, 512, 1024)),
        *(Head(f"vocabulary {v}", 512, 576, v) for v in (8192, 16384, 32768)),
    ),
    "models-sweep": (
        *(Head(f"rows {n}", n, 4096, 128256) for n in (1024, 2048, 4096, 8192, 16384, 32768)),
        *(Head(f"vocabulary {v}", 8192, 4096, v) for v in (32000, 65536, 262144)),
    ),
}
LOSS = {
    "small": (Responses("small", 4, 24, 64, 3001),),
    "default": (Responses("SmolLM2-135M", 8, 256, 576, 49152),),
    "models": (Responses("Llama-3-8B", 16, 512, 4096, 128256),),
}
LOSS["full"] = LOSS["default"]
LOGITS = {
    "small": (Logits("small", 33, 3001),),
    "default": (Logits("SmolLM2-135M", 512, 49152),),
    "full": (Logits("SmolLM2-135M", 512, 49152), Logits("Llama-3.2-1B", 512, 128256)),
    "models": (
        Logits("Llama-3-8B", 8192, 128256),
        Logits("Qwen2.5-7B", 8192, 151936),
        Logits("Gemma-2-2B", 8192, 256000),
        Logits("Llama-3-8B, few rows", 32, 128256),  # fewer than a GPU has multiprocessors
    ),
}
PACKED = {
    "small": (Packed("small", 7, 101),),
    "default": (
        Packed("64 of 512", 64, 64 * 512),
        Packed("a million tokens", 1999, 10**6),
        Packed("1 of a million", 1, 10**6),
    ),  # 1999 does not divide: ragged
}
PACKED["full"] = PACKED["default"]
SEQUENCES = {
    "small": (Packed("small", 6, 102),),
    "default": (
        Packed("fixed cost", 2, 2 * 4),  # what every call pays: take it off before dividing by tokens
        Packed("20 of 512", 20, 20 * 512),
        Packed("8 of 1024", 8, 8 * 1024),
        Packed("64 of 512", 64, 64 * 512),
        Packed("a token each", 10**6, 10**6),
        Packed("32 of 32768", 32, 32 * 32768),
    ),
}
SEQUENCES["full"] = (*SEQUENCES["default"], Packed("ten million tokens", 20000, 20000 * 500))
DPO = ("small", "8 of 1024", "64 of 512")  # where a whole DPO call is raced too
RL_CASES = {  # which cases are raced at which batch
    "32 of 4096": ("gae",),  # with the loops over time of verl and OpenRLHF
    "1024 of 4096": ("gae-large", "advantages"),
    "1 of a million": ("packed",),
    "a million of 1": ("packed",),
    "30 of 32768": ("packed",),
    "ten million": ("packed",),
    "a hundred million": ("packed",),
    "1 of a hundred million": ("packed",),
}
RL = {
    "small": (Packed("small", 7, 7 * 33),),
    "default": (
        Packed("32 of 4096", 32, 32 * 4096),
        Packed("1024 of 4096", 1024, 1024 * 4096),
        Packed("1 of a million", 1, 10**6),
        Packed("a million of 1", 10**6, 10**6),
        Packed("30 of 32768", 30, 30 * 32768),
    ),
}
RL["full"] = (
    *RL["default"],
    Packed("ten million", 10**4, 10**7),
    Packed("a hundred million", 10**5, 10**8),
    Packed("1 of a hundred million", 1, 10**8),
)
REWARD = {
    "small": (Pairs("small", 7),),
    "default": (Pairs("a batch", 64), Pairs("a large one", 4096), Pairs("a million", 10**6)),
}
REWARD["full"] = REWARD["default"]
CONTRAST = {
    "small": (Rows("small", 48, 16),),
    "default": (Rows("1024 responses", 1024, 1024), Rows("8192 responses", 8192, 1024)),
}
CONTRAST["full"] = CONTRAST["default"]
