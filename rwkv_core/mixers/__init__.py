"""One file per RWKV generation, each to be read beside its paper."""
