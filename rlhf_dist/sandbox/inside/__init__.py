"""What runs in the sandbox: the standard library only, and nothing of the rest of this project.

The folder is seen inside under another name, so its modules import each other relatively.
"""
