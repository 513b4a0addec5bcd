"""What a block can be: variants, their initialisation and fits, families, the block library. No Prefect in here.

What every package needs is here too: errors, files, the store of finished work, the locks of this machine's devices.
"""
