"""bitsandbytes for code that imports it: its modules, its operators, its names, as bnbref serves them.

alias      `install_as_bitsandbytes`
startup    the start-up hook, for other processes
finder     what the import system asks
surface    where each public name of bitsandbytes comes from, and which are missing, with the reason
ops        `torch.ops.bitsandbytes`
fakes      what their results look like, for torch.compile
extras     old functions and constants, which bnbref has for the alias alone
updates    steps of optimizers on bare tensors
utils      `bitsandbytes.utils`
backend    bnbref's kernels in the real bitsandbytes
"""
