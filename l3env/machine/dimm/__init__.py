"""Ground truth of the PIM side: one rank of DIMM-PIM simulated DRAM command by DRAM command, and its linear fit.

``setup`` says what is built and how it is laid out, ``simulate`` runs it; ``bus``, ``bank_level`` and ``rank_level``
are the compiled core; ``fit`` makes the linear model that the engine uses and ``stored`` reads it from the presets.
"""
