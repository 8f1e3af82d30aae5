"""The makers of the kit's cases: inputs chosen where wrong implementations show, each with the rules it tests and the bugs it was
made from.

Everything is integers, powers of two and neighbours of thresholds; noise is a hash of the index. So the cases are the same bytes
on every machine, and where absmax is a power of two, scaling is exact in any formulation and the expected codes are unique.

inputs.py makes the numbers; codes.py, values.py, sums.py, steps.py and steps_8bit.py have the cases of the operations that the
oracles of the same names judge. What they give is published, in bnbref/conformance/v1 and so on, and read from there.
"""
