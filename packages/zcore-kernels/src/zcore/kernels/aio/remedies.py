"""What to do about an errno, for the last sentence of errors."""

import errno

__all__ = ["remedy"]

REMEDIES = {
    errno.ENOENT: 'Check the path; mode "w+" makes a file.',
    errno.EISDIR: "Give the path of a file in it.",
    errno.EACCES: "Check the permissions of the file and of its folders.",
    errno.EROFS: "Its file system is mounted read-only; choose another path.",
    errno.ENOSPC: "Free space there, or choose another path; `File.allocate` reserves room before work begins.",
    errno.EDQUOT: "Free some of the quota there, or choose another path.",
    errno.EFBIG: "Raise the limit of file sizes (`ulimit -f`), or use a file system with longer files.",
    errno.EIO: "The device failed; the kernel's log (dmesg) says how.",
    errno.EMFILE: "Close files, or raise the limit of open ones (`ulimit -n`).",
    errno.EINVAL: 'Its file system may lack O_DIRECT: pass direct="auto" or False.',
}


def remedy(code: int) -> str:
    """What to do about errno `code`."""
    return REMEDIES.get(code, f"errno is {errno.errorcode.get(code, code)}; see `man 2 pread` and `man 2 pwrite`.")
