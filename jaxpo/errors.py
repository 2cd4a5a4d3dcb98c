"""The one error that is the user's to mend, told without a traceback."""


class UserError(Exception):
    """A mistake in a config, a data file or a checkpoint.

    The message is one paragraph that names the file and line or the config key, what was found and what was expected.
    `python -m jaxpo.launch` prints it and exits with status 2; everything else that is raised is a defect of jaxpo.
    """
