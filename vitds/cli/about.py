"""Commands that say what there is: this machine, the recipes, timm's models."""

from __future__ import annotations

from vitds.errors import ResourceError


def doctor(*, json: bool = False) -> None:
    """Check this machine and installation.

    Versions, devices, native bf16, compiled parts, launcher, cores, memory, free disk: each line is ok, a
    warning, or broken with its fix.

    Args:
        json: print one JSON object and nothing else
    """
    from vitds.jobs.doctor import doctor

    if broken := doctor(as_json=json):
        raise ResourceError(f"{broken} broken, see above; each has its fix beside it")


def recipes() -> None:
    """List the recipes that come with vitds; `vitds recipes show R` prints one."""
    from vitds.jobs.recipes import print_recipes

    print_recipes()


def recipes_show(recipe: str) -> None:
    """Print a recipe's whole settings tree as YAML.

    Every default is filled in. Saved as a file, it is a recipe of your own: --recipe FILE.yaml.

    Args:
        recipe: a recipe's name or a YAML file
    """
    from vitds.jobs.recipes import show_recipe

    show_recipe(recipe)


def models(pattern: str = "deit*", *, side: int | None = None, json: bool = False) -> None:
    """List timm's models: parameters, width of the features, sides of crops, operations.

    Each model is asked, which takes about a second; nothing is downloaded or trained.

    Args:
        pattern: of names, * stands for anything: '*vit*tiny*' in quotes
        side: of the crop whose operations are counted, in pixels (default the side of the published weights)
        json: print one JSON object and nothing else
    """
    from vitds.jobs.models import print_models

    print_models(pattern, side_px=side, as_json=json)
