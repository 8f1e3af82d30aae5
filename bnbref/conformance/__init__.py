"""A conformance kit: are a backend's bits right, and if not, which rule did it break?

    python -m bnbref check --backend bitsandbytes --device cpu
    pytest --pyargs bnbref.conformance --backend my.module
    python -m bnbref vectors gen quantize_4bit | yourprogram | python -m bnbref vectors check quantize_4bit

A backend is a module of plain functions, one for each of `operations.OPERATIONS`; an operation that it lacks counts as not
implemented, not as wrong. A case is the arguments of one call and what the rules (specification.py) allow as its results. Most
are stored (vectors.py), others are made when the kit runs (made.py). Each result is judged (judge.py), and a wrong one is
compared with the conventions of known backends (explain.py).
"""
