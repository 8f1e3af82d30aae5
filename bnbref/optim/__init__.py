"""8-bit, paged and compiled optimizers under bitsandbytes' names: each rule is an equation, everything else is derived."""
