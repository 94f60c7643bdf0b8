"""The blog's comparison on all of Imagenette, with the controls it lacks; read by nbs/tutorials/winning_the_lottery.

    make reproduce                                            # everything that is not there yet
    .venv/bin/python experiments/imagenette.py                # what there is, and what each part still costs
    .venv/bin/python experiments/imagenette.py blog:0,1 far   # two seeds of one part side by side, all seeds of another one by one

A seed's results go to experiments/imagenette/<part>/ when it is done and are not run again; states go to runs/imagenette, from where
a run that was stopped goes on. Recipes and questions were fixed before the first run, but for `faster`: it asks what the results of
`one_cycle` left open.
"""
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from lth_nb.all import Experiment, Recipe, Results, dense, dense_long, finetune, geometric, imagenette_learner, imp, iterative, reinit, shuffled, supermask, twin

HERE = Path(__file__).with_suffix('')

BLOG = Recipe(imagenette_learner, epochs=5, lr=1e-3, options=dict(size=64, bs=64, opt='fused_adam'))
EARLY, LATE = imp(), imp(rewind_epoch=1)
STEP_37 = imp(rewind_step=37)
ONE_CYCLE = replace(BLOG, anneal='one_cycle')

PARTS = {
    # is there a gain, and beyond what the controls reach?
    'blog': Experiment(BLOG, [dense(), EARLY, LATE, reinit(of=EARLY), shuffled(of=LATE), dense_long(of=EARLY)], iterative, 50, range(5)),
    # how far can one prune?
    'far': Experiment(BLOG, [dense(), EARLY, STEP_37, LATE, reinit(of=STEP_37, levels='all'), shuffled(of=STEP_37, levels='all')], geometric(n_steps=6), 100*(1 - .5**6), range(2)),
    # what the optimizer, the blog's longer rounds and plain fine-tuning do
    'rounds': Experiment(BLOG, [dense(), finetune(of=EARLY), imp(rewind_epoch=1, full_epochs=True), imp(optimizer='keep')], iterative, 50, range(3)),
    # with a learning rate that ends low
    'one_cycle': Experiment(ONE_CYCLE, [dense(), EARLY, LATE], iterative, 50, range(3)),
    # why a ticket learns faster: by the order of the images, by its mask on any weights, by its mask on its own before any training?
    'faster': Experiment(ONE_CYCLE, [dense(), EARLY, twin(of=EARLY, levels='last'), reinit(of=EARLY), supermask(of=EARLY, levels='all')], iterative, 50, range(3)),
    # the blog's image size
    '128px': Experiment(BLOG.with_options(size=128), [dense(), EARLY, LATE], iterative, 50, range(1)),
    # what bfloat16 costs, beside the dense networks of `blog`
    'bf16': Experiment(replace(BLOG, precision='bf16'), [dense()], iterative, 50, range(3)),
}


def done(part):
    "The results of a part that are there, or None."
    return Results.load(HERE/part) if (HERE/part/'results.json').exists() else None


def seeds_left(part):
    "The seeds of a part that are still to run."
    there = done(part)
    return [s for s in PARTS[part].seeds if there is None or s not in {r['seed'] for r in there.rows}]


def run(part, seeds, n_jobs):
    "Run seeds of a part, and put their results with those of the others."
    found = replace(PARTS[part], seeds=seeds).run('runs/imagenette', n_jobs)
    if found.failed: raise SystemExit(f'{part}, seeds {seeds}: {found.failed}')
    there = done(part)
    (there + found if there else found).save(HERE/part)


def main(wanted):
    warnings.filterwarnings('ignore', category=FutureWarning)
    if not wanted:
        for part, exp in PARTS.items(): print(f'{part}: seeds left {seeds_left(part)} of {list(exp.seeds)}; {exp.plan("runs/imagenette").note}')
    for name in PARTS if wanted == ['all'] else wanted:
        part, _, seeds = name.partition(':')
        left = seeds_left(part)
        together = [[int(s) for s in seeds.split(',') if int(s) in left]] if seeds else [[s] for s in left]
        for some in filter(None, together): run(part, some, os.cpu_count())


if __name__ == '__main__': main(sys.argv[1:])
