"""The commands of vqdeploy, one file each: typed options, and the function that runs with them.

Heavy imports happen inside the functions, so that ``--help`` answers at once. ``shared`` holds what
several commands share.
"""
