"""What every command line needs: options, files, images, pictures, the machine.

No equation imports it.
"""
