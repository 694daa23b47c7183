#include "zcore/file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace zcore {

namespace {

[[noreturn]] void fail(int error, const std::string& what) {
    throw std::system_error(error, std::generic_category(), what);
}

int flags_of(Access access) {
    switch (access) {
        case Access::read: return O_RDONLY | O_CLOEXEC;
        case Access::update: return O_RDWR | O_CLOEXEC;
        default: return O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC;
    }
}

int open_retrying(const std::string& path, int flags) {
    int descriptor;
    do {
        descriptor = ::open(path.c_str(), flags, 0666);
    } while (descriptor < 0 && errno == EINTR);
    return descriptor;
}

// What the file system asks of direct transfers, at least a page; 0 where it says that it has none.
std::size_t direct_alignment(int descriptor) {
    auto alignment = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
#if defined(STATX_DIOALIGN)
    struct statx status {};
    if (statx(descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 && (status.stx_mask & STATX_DIOALIGN) != 0) {
        if (status.stx_dio_offset_align == 0) {
            return 0;
        }
        alignment = std::max<std::size_t>({alignment, status.stx_dio_offset_align, status.stx_dio_mem_align});
    }
#endif
    return alignment;
}

bool is_same_file(int first, int second) {
    struct stat one {}, two {};
    return fstat(first, &one) == 0 && fstat(second, &two) == 0 && one.st_dev == two.st_dev && one.st_ino == two.st_ino;
}

}  // namespace

std::shared_ptr<File> File::open(const std::string& path, Access access, Caching caching) {
    const std::shared_ptr<File> file(new File());
    file->path_ = path;
    const int flags = flags_of(access);
    file->buffered_ = open_retrying(path, flags);
    if (file->buffered_ < 0) {
        fail(errno, "open " + path);
    }
    if (caching == Caching::page_cache) {
        file->why_buffered_ = "the page cache was asked for";
        return file;
    }
    file->direct_ = open_retrying(path, (flags & ~(O_CREAT | O_TRUNC)) | O_DIRECT);
    if (file->direct_ < 0 && errno != EINVAL) {
        fail(errno, "open " + path + " with O_DIRECT");
    }
    if (file->direct_ >= 0 && !is_same_file(file->buffered_, file->direct_)) {
        fail(ESTALE, "open " + path + ": it was replaced by another file meanwhile");
    }
    const std::size_t alignment = file->direct_ < 0 ? 0 : direct_alignment(file->direct_);
    if (alignment != 0) {
        file->alignment_ = alignment;
        return file;
    }
    if (caching == Caching::direct) {
        fail(EINVAL, "open " + path + ": its file system has no O_DIRECT");
    }
    file->why_buffered_ = "its file system has no O_DIRECT";
    if (file->direct_ >= 0) {
        ::close(file->direct_);
        file->direct_ = -1;
    }
    return file;
}

File::~File() {
    for (const int descriptor : {buffered_, direct_}) {
        if (descriptor >= 0) {
            ::close(descriptor);
        }
    }
}

std::uint64_t File::size() const {
    const off_t end = lseek(buffered_, 0, SEEK_END);  // of block devices too; transfers have offsets of their own
    if (end < 0) {
        fail(errno, "find the size of " + path_);
    }
    return static_cast<std::uint64_t>(end);
}

void File::allocate(std::uint64_t bytes) const {
    int error = 0;
    do {
        error = bytes == 0 ? 0 : posix_fallocate(buffered_, 0, static_cast<off_t>(bytes));
    } while (error == EINTR);
    if (error != 0) {
        fail(error, "allocate " + std::to_string(bytes) + " bytes of " + path_);
    }
}

void File::sync() const {
    while (fdatasync(buffered_) != 0) {
        if (errno != EINTR) {
            fail(errno, "sync " + path_);
        }
    }
}

}  // namespace zcore
