# A device that is host memory, with a kvernd that knows it; and the real one. See device_player.h.
add_executable(host_device_daemon host_device_daemon.cc)
target_link_libraries(host_device_daemon PRIVATE kvern::service kvern_warnings)
kvern_test(test_integration_device
  SOURCES device_path_test.cc host_player.cc
  USES connector
  LABELS integration
  TIMEOUT 300)
add_dependencies(test_integration_device host_device_daemon)
target_compile_definitions(test_integration_device PRIVATE HOST_DEVICE_DAEMON_PATH="$<TARGET_FILE:host_device_daemon>")

if(KVERN_HAVE_CUDA)
  find_package(CUDAToolkit REQUIRED)
  kvern_test(test_integration_cuda
    SOURCES device_path_test.cc cuda_player.cc
    USES connector
    LIBRARIES CUDA::cudart_static
    LABELS gpu
    TIMEOUT 300)
  add_dependencies(test_integration_cuda kvernd)
  target_compile_definitions(test_integration_cuda PRIVATE KVERND_PATH="$<TARGET_FILE:kvernd>")
endif()
