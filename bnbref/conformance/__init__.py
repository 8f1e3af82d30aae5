"""A conformance kit: are a backend's bits right, and if not, which rule did it break?

    python -m bnbref check --backend bitsandbytes --device cpu
    pytest --pyargs bnbref.conformance --backend my.module
    python -m bnbref vectors gen quantize_4bit | yourprogram | python -m bnbref vectors check quantize_4bit

A backend is a module of plain functions, one for each of `operations.OPERATIONS`; one that it lacks is not implemented, not
wrong. Cases are inputs and what is allowed as their output (cases.py, vectors.py), each result is judged by the rules
(rules.py), and one that differs is compared with the conventions of known backends (dialects.py).
"""
