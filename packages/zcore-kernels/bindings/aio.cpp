// zcore.kernels._aio: files, queues of requests and checksums of native/ for Python. Addresses come in as integers,
// checked by the Python side, which also keeps the memory alive. What waits does so without the interpreter's lock.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <chrono>
#include <exception>
#include <memory>
#include <string>
#include <system_error>

#include "zcore/crc32c.hpp"
#include "zcore/file.hpp"
#include "zcore/file_queue.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using zcore::File;
using zcore::FileQueue;
using zcore::Request;

namespace {

std::chrono::nanoseconds seconds(double count) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(count));
}

std::shared_ptr<File> open_file(const nb::bytes& path, int access, int caching) {
    const std::string name(path.c_str(), path.size());
    const nb::gil_scoped_release unlocked;
    return File::open(name, static_cast<zcore::Access>(access), static_cast<zcore::Caching>(caching));
}

// A queue that ends without the interpreter's lock: it waits for its threads, and one of these takes the lock where it is
// the last to let go of a file that Python has made.
class Queue {
public:
    explicit Queue(const zcore::FileQueueOptions& options) : queue_(std::make_unique<FileQueue>(options)) {}
    ~Queue() {
        const nb::gil_scoped_release unlocked;
        queue_.reset();
    }
    Queue(const Queue&) = delete;
    Queue& operator=(const Queue&) = delete;

    FileQueue* operator->() const { return queue_.get(); }

private:
    std::unique_ptr<FileQueue> queue_;
};

std::shared_ptr<Request> submit(Queue& queue, std::shared_ptr<File> file, bool writes, std::uint64_t offset,
                                std::uintptr_t address, std::size_t bytes) {
    const auto direction = writes ? zcore::Direction::write : zcore::Direction::read;
    return queue->submit({std::move(file), direction, offset, reinterpret_cast<std::byte*>(address), bytes});
}

std::uint32_t crc32c(std::uintptr_t address, std::size_t bytes, std::uint32_t before) {
    return zcore::crc32c({reinterpret_cast<const std::byte*>(address), bytes}, before);
}

// As OSError, which has a place for the errno.
void translate(const std::exception_ptr& thrown, void*) {
    try {
        std::rethrow_exception(thrown);
    } catch (const std::system_error& error) {
        PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code().value(), error.what()).ptr());
    }
}

}  // namespace

NB_MODULE(_aio, module) {
    const nb::call_guard<nb::gil_scoped_release> unlocked;
    nb::register_exception_translator(translate);
    module.attr("END_OF_FILE") = zcore::end_of_file;
    module.def("crc32c", &crc32c, unlocked, "address"_a, "nbytes"_a, "before"_a);
    module.def("crc32c_combine", &zcore::crc32c_combine, "first"_a, "second"_a, "second_nbytes"_a);

    nb::class_<File>(module, "File")
        .def_static("open", &open_file, "path"_a, "access"_a, "caching"_a)
        .def("size", &File::size)
        .def("allocate", &File::allocate, unlocked, "nbytes"_a)
        .def("sync", &File::sync, unlocked)
        .def_prop_ro("is_direct", &File::is_direct)
        .def_prop_ro("alignment", &File::alignment)
        .def_prop_ro("why_buffered", &File::why_buffered);

    nb::class_<Request>(module, "Request")
        .def_prop_ro("is_done", &Request::is_done)
        .def("wait_for", [](const Request& self, double patience_s) { return self.wait_for(seconds(patience_s)); },
             unlocked, "patience_s"_a)
        .def_prop_ro("error", [](const Request& self) { return self.outcome().error; })
        .def_prop_ro("failed_offset", [](const Request& self) { return self.outcome().failed_offset; })
        .def_prop_ro("direct_nbytes", [](const Request& self) { return self.outcome().direct_bytes; })
        .def_prop_ro("crc32c", [](const Request& self) { return self.outcome().crc32c; });

    nb::class_<Queue>(module, "FileQueue")
        .def("__init__",
             [](Queue* self, int queue_depth, std::size_t block_bytes, int threads, int backend, bool checksum) {
                 new (self) Queue({queue_depth, block_bytes, threads, static_cast<zcore::Backend>(backend), checksum});
             },
             "queue_depth"_a, "block_bytes"_a, "threads"_a, "backend"_a, "checksum"_a)
        .def("submit", &submit, unlocked, "file"_a, "writes"_a, "offset"_a, "address"_a, "nbytes"_a)
        .def("wait_all_for",
             [](const Queue& self, double patience_s) { return self->wait_all_for(seconds(patience_s)); }, unlocked,
             "patience_s"_a)
        .def_prop_ro("threads", [](const Queue& self) { return self->options().threads; })
        .def_prop_ro("is_io_uring",
                     [](const Queue& self) { return self->options().backend == zcore::Backend::io_uring; })
        .def_prop_ro("why_threads", [](const Queue& self) { return self->why_threads(); });
}
