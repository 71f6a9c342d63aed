"""What is asked, what is here, who can, and why not: no torch and no plugin code, ever."""
