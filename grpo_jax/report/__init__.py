"""A page of a run, or of several: its curves, its rollouts, and in words what came of it. `python -m grpo_jax.report --help`

    reading    a run's folder -> its metrics and groups, as far as they are written; goes on reading where it stopped
    calls      the text of a response -> thought and calls apart, its calls against the right ones
    words      metrics and groups -> what a person would want to know, in sentences
    panels     names of metrics -> which curves stand where
    page       some runs -> the parts of a page -> one file that asks nothing of anybody
    server     the same page on this machine's own address, while a run goes on

What a response says, calls and misses is found out here, by the rules of grpo_jax.reward; page.js shows it. All that a run
wrote reaches the page as compressed data and is put there as text, never as markup; the page's policy (Content-Security-Policy)
lets no other script run than the page's own. uplot.js draws the curves (uPlot 1.6.32, MIT, uplot.LICENSE).
"""
