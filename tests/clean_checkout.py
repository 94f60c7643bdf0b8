"Exit with an error if exporting, cleaning or making the README changes a file that is committed."
import subprocess
import sys


def state():
    "What git says of the checkout, with the contents of what has changed."
    run = lambda *args: subprocess.run(['git', *args], capture_output=True, text=True, check=True).stdout
    return run('status', '--porcelain') + run('diff')


before = state()
for command in (['nbdev-export'], ['nbdev-clean'], ['make', '-s', 'readme']): subprocess.run(command, check=True)
if state() != before:
    print('export, clean or README changed files:\n' + state()[:3000])
    sys.exit(1)
