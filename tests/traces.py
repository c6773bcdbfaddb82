"""Reading what `ssm_jax.training.profiling.Trace` leaves."""

import warnings

import jax


def traced(folder):
    """The names of all that was traced, and the numbers of the train steps, in order."""
    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, about jaxlib's types
        events = [
            event
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
            for line in plane.lines
            for event in line.events
        ]
        steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
        return {event.name for event in events}, sorted(steps)
