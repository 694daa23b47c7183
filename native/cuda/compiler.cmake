# Whether CUDA kernels are built, decided once: sets ZCORE_BUILDS_CUDA, and where it is true enables the language and
# names the architectures. Included by whichever project stands on top, since a language has to be enabled there.
#   ZCORE_CUDA=AUTO   where a CUDA compiler is found that knows C++20
#   ZCORE_CUDA=ON     demanded: without such a compiler the build ends
#   ZCORE_CUDA=OFF    never
if(DEFINED ZCORE_BUILDS_CUDA)
  return()
endif()

set(ZCORE_CUDA AUTO CACHE STRING "AUTO, ON or OFF: build the kernels for NVIDIA GPUs")
set(ZCORE_BUILDS_CUDA FALSE)
if(ZCORE_CUDA STREQUAL "OFF")
  return()
endif()

include(CheckLanguage)
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # while the compiler is looked for
endif()
check_language(CUDA)
string(CONCAT zcore_remedy "Put nvcc of CUDA 12.1 or newer, and a host compiler that it takes, on PATH (or name it in "
       "CUDACXX), or build without: -DZCORE_CUDA=OFF, with pip -Ccmake.define.ZCORE_CUDA=OFF.")
if(NOT CMAKE_CUDA_COMPILER)
  if(NOT ZCORE_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "ZCORE_CUDA=${ZCORE_CUDA} demands kernels for NVIDIA GPUs, and no CUDA compiler works here. ${zcore_remedy}")
  endif()
  message(STATUS "No CUDA compiler: built without kernels for NVIDIA GPUs")
  return()
endif()

set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # so that what is built loads on a machine without a driver
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.1)
  if(NOT ZCORE_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "ZCORE_CUDA=${ZCORE_CUDA} demands kernels for NVIDIA GPUs, and the CUDA compiler here is "
                        "${CMAKE_CUDA_COMPILER_VERSION}. ${zcore_remedy}")
  endif()
  message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} is too old: built without kernels for NVIDIA GPUs")
  return()
endif()

# Machine code of each generation, which its later members run, too; and PTX of the newest, for those to come.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
  else()
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100)
  endif()
endif()
set(ZCORE_BUILDS_CUDA TRUE)
message(STATUS "Kernels for NVIDIA GPUs: CUDA ${CMAKE_CUDA_COMPILER_VERSION}, ${CMAKE_CUDA_ARCHITECTURES}")
