try:
    from gsgd.demo.compare import main
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; the demo needs: pip install 'gsgd[demo]'") from error

main()
