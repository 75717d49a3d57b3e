"""The results of the L3 paper (arXiv 2504.17584), side by side: ``l3env reproduce [FIGURE|all] [--json]``.

One module a figure; each has ``rows()``: what the paper reports, what comes out here, their ratio, and a note. Figures
are grouped by quantity; where the paper's two versions number them differently, the quantity is what counts.
"""
