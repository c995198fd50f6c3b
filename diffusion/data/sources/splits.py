"""The names of splits."""

# The names under which folders and datasets keep a split, in the order in which they are looked for.
SPLIT_NAMES = {'test': ('test', 'val', 'valid', 'validation'), 'validation': ('validation', 'valid', 'val')}
