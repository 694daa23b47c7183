// What becomes of a queue where a container's policy refuses io_uring: a filter of system calls in a child stands for it.
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <string>
#include <system_error>

#include "tests/scratch.hpp"
#include "zcore/file_queue.hpp"

namespace {

bool refuse_io_uring(int error) {
    sock_filter rules[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<unsigned>(error)),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    const sock_fprog program{std::size(rules), rules};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

int work_without_rings(int error, const std::string& path) {
    if (!refuse_io_uring(error)) {
        return 77;
    }
    try {
        zcore::FileQueue({.backend = zcore::Backend::io_uring});
        return 1;
    } catch (const std::system_error& refusal) {
        if (refusal.code().value() != error) {
            return 2;
        }
    }
    zcore::FileQueue queue({});
    if (queue.options().backend != zcore::Backend::threads || queue.options().threads != 4 ||
        queue.why_threads().find("io_uring_setup") == std::string::npos) {
        return 3;
    }
    const Pages pages(100000, 7);
    const auto file = zcore::File::open(path, zcore::Access::create, zcore::Caching::direct_if_possible);
    const auto request = queue.submit({file, zcore::Direction::write, 0, pages.data(), pages.size()});
    request->wait();
    return request->outcome().error == 0 ? 0 : 4;
}

}  // namespace

TEST(RefusedRing, IsReplacedByThreadsUnlessAskedForByName) {
    const Scratch scratch;
    for (const int error : {EPERM, ENOSYS}) {
        const pid_t child = fork();
        if (child == 0) {
            _exit(work_without_rings(error, scratch.path("file")));
        }
        int status = -1;
        ASSERT_EQ(waitpid(child, &status, 0), child);
        ASSERT_TRUE(WIFEXITED(status));
        if (WEXITSTATUS(status) == 77) {
            GTEST_SKIP() << "this system lets no process filter its calls";
        }
        EXPECT_EQ(WEXITSTATUS(status), 0);
    }
}
